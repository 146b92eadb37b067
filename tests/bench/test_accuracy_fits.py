import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from accuracy_requests import BASE, hashes, of, request
from sidetune import build_backbone
from sidetune.bench.accuracy import bench_accuracy, fits
from sidetune.bench.accuracy.fits import Fit, run_fits
from sidetune.bench.accuracy.grid import at, parse_methods
from sidetune.bench.accuracy.ground import Images, Opening, open_ground
from sidetune.bench.accuracy.protocol import choose, few_shots, finals, shot_fits
from sidetune.bench.accuracy.tasks import find_tasks
from sidetune.bench.accuracy.voices import answers, both_voices
from sidetune.blend import best_share
from sidetune.errors import DivergedError
from sidetune.recipe import Recipe
from vtab_tasks import make_suite

train_module = importlib.import_module("sidetune.train")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return make_suite(tmp_path_factory.mktemp("suite"))


def ground_of(suite, folder, stores):
    how = Opening(Recipe.build(BASE), folder, stores, quiet=True)
    return open_ground(find_tasks(suite)[0], build_backbone("toy"), how)


@pytest.fixture(scope="module")
def stores(suite, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    ground_of(suite, folder / "out", folder)
    return folder


@pytest.fixture
def losa():
    (method,) = parse_methods("losa")
    return method, method.recipe(Recipe.build(BASE))


def test_a_fit_on_its_own_rows_is_the_same_whoever_else_was_missing(suite, stores, losa, tmp_path):
    method, recipe = losa
    ground = ground_of(suite, tmp_path / "together", stores)
    asked = shot_fits(ground, method, few_shots(ground, method, recipe, 3), range(2), 3)
    assert asked[0].rows.tolist() != asked[1].rows.tolist()
    together = run_fits(ground, method, asked)
    apart = ground_of(suite, tmp_path / "apart", stores)
    for fit, entry in zip(asked, together, strict=True):
        (alone,) = run_fits(apart, method, [fit])
        assert alone.outputs["test"].equal(entry.outputs["test"])
        assert alone.facts["networks"] == entry.facts["networks"] == 1


def test_fits_on_the_same_rows_are_one_fleet_and_taps_are_scaled_on_these(
    suite, stores, losa, tmp_path, monkeypatch
):
    method, recipe = losa
    ground, opened, original = ground_of(suite, tmp_path, stores), [], fits.open_fleet

    def open_fleet(job, recipes, rows, **more):
        opened.append((len(recipes), rows.tolist(), more["scaled_on"].tolist()))
        return original(job, recipes, rows, **more)

    monkeypatch.setattr(fits, "open_fleet", open_fleet)
    finals(ground, method, recipe, range(2))
    assert opened == [(2, ground.rows.tolist(), ground.rows.tolist())]


def test_two_voices_say_what_a_network_with_ridge_in_it_says(suite, stores, losa, tmp_path):
    plain, recipe = losa
    (both,) = parse_methods("losa+ridge")
    ground = ground_of(suite, tmp_path, stores)
    recipe = at(recipe, {"ridge": 0.4})
    asked = [Fit("seed-0", recipe, ground.rows, ground.tests)]
    (mixed,), (inside,) = answers(ground, both, asked), run_fits(ground, plain, asked)
    (network,) = run_fits(ground, plain, [replace(asked[0], recipe=at(recipe, {"ridge": 0.0}))])
    torch.testing.assert_close(mixed.outputs["test"], inside.outputs["test"], rtol=1e-4, atol=1e-4)
    assert (mixed.outputs["test"] - network.outputs["test"]).abs().max() > 0.1
    kept = (tmp_path / ground.name / both.name).iterdir()
    assert {path.name.partition("-")[0] for path in kept} == {"ridge"}


def test_the_share_is_the_one_with_the_least_loss_and_each_point_has_its_own(suite, stores, losa, tmp_path):
    (both,) = parse_methods("losa+ridge")
    ground = ground_of(suite, tmp_path, stores)
    choice = choose(ground, both, losa[1], 2)
    (held,) = ground.choosing.folds
    target = ground.job.targets[held.held]
    images = {"held": Images.of(ground.job, ground.keys, held.held)}
    for point, score in choice.tried:
        fit = Fit("choice", at(losa[1], point), held.train, images)
        networks, ridges = both_voices(ground, both, [fit])
        network, ridge = networks[0].outputs["held"], ridges[0].outputs["held"]
        assert point["ridge"] == best_share(ground.job.task, network, ridge, target)
        mixed = (1 - point["ridge"]) * network + point["ridge"] * ridge
        assert score == pytest.approx((mixed.argmax(1) == target).float().mean().item())
    assert choice.recipe.head.ridge in {point["ridge"] for point, _ in choice.tried}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("steps", [14, 35])  # of the finals; of the second table
def test_finals_that_were_killed_go_on_from_their_checkpoint(suite, tmp_path, monkeypatch, steps):
    optimizer = importlib.import_module("sidetune.optimizer")
    original, made = optimizer.MemberAdamW.step, []
    protocol = importlib.import_module("sidetune.bench.accuracy.protocol")
    seconds = iter([2.0, 1.0] * 4)
    monkeypatch.setattr(protocol, "solo_epoch_seconds", lambda *_: next(seconds))

    def step(self, updates):
        if len(made) == steps:
            raise Killed
        made.append(1)
        return original(self, updates)

    def command(folder):
        asked = request(suite, tmp_path / folder, "losa,last", against=("losa",), grid_size=1)
        return bench_accuracy(replace(asked, tasks=asked.tasks[:1], stores=tmp_path / "stores"))

    whole = command("whole")
    monkeypatch.setattr(train_module, "CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(optimizer.MemberAdamW, "step", step)
        command("killed")
    (checkpoint,) = (tmp_path / "killed").rglob("checkpoint-*.safetensors")
    loaded, load = [], train_module.load_checkpoint
    monkeypatch.setattr(train_module, "load_checkpoint", lambda *args: loaded.append(args[0]) or load(*args))
    again = command("killed")
    assert loaded == [checkpoint]
    assert hashes(again) == hashes(whole)
    assert not list((tmp_path / "killed").rglob("checkpoint-*.safetensors"))


def test_probes_are_chosen_by_the_score_that_trained_methods_are_chosen_by(
    suite, stores, tmp_path, monkeypatch
):
    asked = []
    for name in ("fit_ridge", "fit_linear"):
        original = getattr(fits, name)
        monkeypatch.setattr(
            fits,
            name,
            lambda *args, _original=original, **more: (
                asked.append(more.get("metric")) or _original(*args, **more)
            ),
        )
    ground = ground_of(suite, tmp_path, stores)
    for method in parse_methods("ridge,linear"):
        choose(ground, method, method.recipe(Recipe.build(BASE)), 1)
    assert asked == ["accuracy", "accuracy"]


def test_a_probe_that_diverges_is_a_row_and_no_end(suite, stores, tmp_path, monkeypatch):
    def diverge(*_, **__):
        raise DivergedError("it diverged")

    monkeypatch.setattr(fits, "fit_linear", diverge)
    asked = request(suite, tmp_path, "ridge,linear", reveal=True, shots=(2,))
    report = bench_accuracy(replace(asked, tasks=asked.tasks[:1], stores=stores))
    linear = of(report, "colours", "linear")
    assert (linear.seeds, linear.scores, linear.val) == ((), (), None)
    assert len(of(report, "colours", "ridge").scores) == 1
    assert [line for line in report.lines() if line.startswith("linear") and "diverged" in line]


def test_what_is_kept_of_a_fit_says_how_it_was_made(suite, stores, losa, tmp_path):
    method, recipe = losa
    (entry,) = finals(ground_of(suite, tmp_path, stores), method, recipe, [0])
    found = Recipe.model_validate(entry.facts["recipe"])
    assert found.train.epochs == 2 and found.train.lr == entry.facts["lr"]
    assert {"sidetune", "torch", "python", "threads"} <= entry.facts["environment"].keys()
    assert "commit" in entry.facts


def test_the_clock_does_not_hang_on_what_is_answered_for(suite, stores, losa, tmp_path):
    method, recipe = losa
    ground = ground_of(suite, tmp_path, stores)
    (fit,) = shot_fits(ground, method, few_shots(ground, method, recipe, 2), [0], 2)
    fewer = replace(fit, asked={})
    assert fit.learns(ground) == fewer.learns(ground) and fit.key(ground) != fewer.key(ground)
    assert fit.learns(ground) != replace(fit, rows=np.sort(fit.rows)[:-1]).learns(ground)

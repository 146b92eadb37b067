import importlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from accuracy_requests import BASE, frozen, hashes, of, request
from clips import make_clips
from sidetune import build_backbone, cli
from sidetune.backbones.base import Backbone
from sidetune.backbones.hooked import HookedBackbone
from sidetune.bench.accuracy import bench_accuracy
from sidetune.bench.accuracy import ledger as ledger_module
from sidetune.bench.accuracy.grid import parse_methods
from sidetune.bench.accuracy.ground import Opening, add_test, live_ground, open_ground
from sidetune.bench.accuracy.picture import apart, draw, pareto, points
from sidetune.bench.accuracy.tasks import TaskFolder, find_tasks
from sidetune.errors import ArtifactError, BackboneError, DataError, RecipeError, RequestError
from sidetune.recipe import Recipe
from vtab_tasks import make_suite, make_task, read_list, write_list

train_module = importlib.import_module("sidetune.train")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return make_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def hidden(suite, tmp_path_factory):
    """A run without test scores, and its folder."""
    folder = tmp_path_factory.mktemp("hidden")
    return bench_accuracy(request(suite, folder)), folder


@pytest.fixture(scope="module")
def revealed(suite, hidden, tmp_path_factory):
    """The same command with them."""
    folder = tmp_path_factory.mktemp("revealed") / "run"
    shutil.copytree(hidden[1], folder)
    return bench_accuracy(request(suite, folder, reveal=True)), folder


def test_before_test_is_revealed_there_is_no_score_of_it_and_no_look(hidden):
    report, folder = hidden
    assert not report.revealed and not report.comparisons[False]
    assert all(one.to_json()["test"] is None for one in report.outcomes + report.timed)
    assert not any(row.metric == "test_accuracy" for row in report.bench().rows)
    assert not (folder / "looks.jsonl").exists()
    assert any("--reveal" in line for line in report.lines())
    assert all(0 <= one.val <= 1 for one in report.outcomes)


def test_every_recipe_is_frozen_with_what_it_was_chosen_on(hidden):
    report, folder = hidden
    pairs = frozen(folder)
    for one in report.outcomes:
        assert pairs[f"{one.task}/{one.method}"]["recipe"] == one.recipe
    assert {"colours/losa at equal time", "shapes/ridge at equal time"} <= pairs.keys()
    assert {"recipe", "data", "backbone"} == set(pairs["colours/losa"])


def test_labels_of_test_decide_nothing(suite, hidden, tmp_path):
    shutil.copytree(suite, tmp_path / "suite")
    for task in ("colours", "shapes"):
        lines = [line.split() for line in read_list(suite / task, "test")]
        labels = np.random.default_rng(1).permutation([label for _, label in lines])
        write_list(
            tmp_path / "suite" / task, "test", [f"{p} {k}" for (p, _), k in zip(lines, labels, strict=True)]
        )
    again = bench_accuracy(request(tmp_path / "suite", tmp_path, equal_time=False))
    report, folder = hidden
    assert hashes(again) == hashes(report)
    there, here = frozen(folder), frozen(tmp_path)
    assert here == {name: pair for name, pair in there.items() if "equal time" not in name}


def test_the_same_command_gives_the_same_predictions_and_scores(suite, revealed, tmp_path):
    report, _ = revealed
    again = bench_accuracy(request(suite, tmp_path, reveal=True, equal_time=False))
    assert hashes(again) == hashes(report)
    assert [one.scores for one in again.outcomes] == [one.scores for one in report.outcomes]


def test_scores_are_of_the_labels_of_test(suite, revealed):
    report, _ = revealed
    for task in ("colours", "shapes"):
        one = of(report, task, "losa")
        assert one.right_SN.shape == (2, 24)
        assert one.scores == tuple(one.right_SN.mean(1))
        assert len(of(report, task, "ridge").scores) == 1
    row = report.bench().row("colours/losa", "test_accuracy")
    assert row.against == "colours/ridge"
    assert row.ratio == pytest.approx(row.value / report.bench().row("colours/ridge", "test_accuracy").value)


def test_every_look_is_counted(suite, revealed):
    report, folder = revealed
    assert {one.looks for one in report.outcomes} == {1}
    again = bench_accuracy(request(suite, folder, reveal=True))
    assert {one.looks for one in again.outcomes} == {2}
    lines = [json.loads(line) for line in (folder / "looks.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["colours", "shapes"] * 2
    assert all(line["methods"] == ["linear", "losa", "ridge"] and len(line["frozen"]) == 64 for line in lines)
    text = "\n".join(again.lines())
    assert f"this one too: 2 a task, as counted in\n  {folder / 'looks.jsonl'}\n" in text


def test_a_second_command_trains_nothing(suite, revealed, monkeypatch):
    report, folder = revealed
    monkeypatch.setattr(ledger_module, "write_tensors", pytest.fail)
    again = bench_accuracy(request(suite, folder))
    assert hashes(again) == hashes(report)


def test_another_recipe_is_not_chosen_in_a_frozen_folder(suite, revealed, tmp_path):
    shutil.copytree(revealed[1], tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"froze another recipe of colours/losa.* Type: --out"):
        bench_accuracy(request(suite, tmp_path / "run", settings=["train.epochs=3"]))


def test_a_method_may_join_a_frozen_folder(suite, revealed, tmp_path):
    shutil.copytree(revealed[1], tmp_path / "run")
    report = bench_accuracy(request(suite, tmp_path / "run", "ridge,last", equal_time=False))
    assert {one.method for one in report.outcomes} == {"ridge", "last"}
    pairs = frozen(tmp_path / "run")
    assert {"colours/last", "colours/losa"} <= pairs.keys()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("fits", [1, 3, 6])
def test_what_has_ended_survives_a_kill(suite, hidden, tmp_path, monkeypatch, fits):
    written = []
    original = ledger_module.write_tensors

    def die(path, *rest):
        if len(written) == fits:
            raise Killed
        written.append(path.name)
        original(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ledger_module, "write_tensors", die)
        bench_accuracy(request(suite, tmp_path, equal_time=False))
    before, first = list(written), {}
    for path in (tmp_path / "out").rglob("*.safetensors"):
        first[path] = path.stat().st_mtime_ns
    assert len(first) == fits
    again = bench_accuracy(request(suite, tmp_path, equal_time=False))
    assert hashes(again) == hashes(hidden[0])
    assert all(path.stat().st_mtime_ns == time for path, time in first.items()), before


def test_a_fit_that_was_killed_goes_on_from_its_checkpoint(suite, hidden, tmp_path, monkeypatch):
    optimizer = importlib.import_module("sidetune.optimizer")
    original, steps = optimizer.MemberAdamW.step, []

    def step(self, updates):
        if len(steps) == 4:
            raise Killed
        steps.append(1)
        return original(self, updates)

    monkeypatch.setattr(train_module, "CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(optimizer.MemberAdamW, "step", step)
        bench_accuracy(request(suite, tmp_path, "losa", against=("losa",), equal_time=False))
    assert list((tmp_path / "out").rglob("checkpoint-*.safetensors"))
    loaded = []
    original_load = train_module.load_checkpoint
    monkeypatch.setattr(
        train_module, "load_checkpoint", lambda *args: loaded.append(1) or original_load(*args)
    )
    again = bench_accuracy(request(suite, tmp_path, "losa", against=("losa",), equal_time=False))
    assert loaded == [1]
    assert hashes(again) == [one for one in hashes(hidden[0]) if one[1] == "losa"]
    assert not list((tmp_path / "out").rglob("checkpoint-*.safetensors"))


def test_a_damaged_fit_is_named(suite, revealed, tmp_path):
    shutil.copytree(revealed[1], tmp_path / "run")
    path = next((tmp_path / "run" / "out" / "colours" / "losa").glob("seed-1-*"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ArtifactError, match=rf"{path.name} is damaged.* Type: rm"):
        bench_accuracy(request(suite, tmp_path / "run"))


def test_equal_time_gives_epochs_of_what_the_quickest_takes(suite, tmp_path, monkeypatch):
    protocol = importlib.import_module("sidetune.bench.accuracy.protocol")
    seconds = iter([1.0, 2.0] * 2 + [1.0] * 2)
    monkeypatch.setattr(protocol, "solo_epoch_seconds", lambda *_: next(seconds))
    settings = ["train.epochs=4"]
    report = bench_accuracy(request(suite, tmp_path, "losa,last", settings=settings, against=("losa",)))
    epochs = {one.method: one.point["epochs"] for one in report.timed}
    assert epochs == {"losa": 4, "last": 2}
    same = {one.task: one for one in report.outcomes if one.method == "losa"}
    for one in report.timed:
        if one.method == "losa":
            assert one.hashes == same[one.task].hashes
    limited = bench_accuracy(
        request(suite, tmp_path / "m", "losa", settings=settings, against=("losa",), minutes=0.1)
    )
    assert {one.point["epochs"] for one in limited.timed} == {6}, "six epochs of a second fit"


def test_class_folders_are_chosen_by_folds(image_folder, tmp_path):
    report = bench_accuracy(request(image_folder, tmp_path, "ridge,losa", reveal=True, grid_size=1))
    (losa,) = (one for one in report.outcomes if one.method == "losa")
    assert 0 <= losa.val <= 1 and len(losa.scores) == 2
    names = {path.name[:13] for path in (tmp_path / "out").rglob("choice-*")}
    assert {f"choice-fold-{k}-"[:13] for k in range(5)} <= names


def test_a_method_with_fewer_seeds_is_marked_and_nothing_is_claimed_of_it(suite, tmp_path):
    asked = request(suite, tmp_path, "ridge,losa,last:1", reveal=True, equal_time=False, against=("losa",))
    report = bench_accuracy(asked)
    assert of(report, "colours", "last").short and not of(report, "colours", "losa").short
    claims = {one.claim for one in report.comparisons[False] if one.method == "last"}
    assert claims == {"no claim: last has 1 of 2 seeds"}
    text = "\n".join(report.lines())
    assert "* fewer seeds" in text


def test_the_text_fits_80_columns_and_the_json_is_json(revealed):
    report, folder = revealed
    assert max(len(line) for line in report.lines() if "looks.jsonl" not in line) <= 80
    fields = json.loads((folder / "out" / "accuracy.json").read_text())
    assert json.loads((folder / "out" / "chosen.json").read_text())["comparisons"] == []
    assert {"rows", "environment", "outcomes", "comparisons", "timed_outcomes", "timed_comparisons"} <= set(
        fields
    )
    one = fields["comparisons"][0]
    assert set(one) == {"where", "method", "against", "value", "interval", "images", "claim"}


def test_baselines_train_one_after_another_and_full_begins_at_the_pixels(suite, tmp_path):
    asked = request(suite, tmp_path, "losa,norms,full", against=("losa",), reveal=True, seeds=1)
    report = bench_accuracy(replace(asked, tasks=asked.tasks[:1]))
    full, norms = (of(report, "colours", name) for name in ("full", "norms"))
    assert full.cost["parameters"] > norms.cost["parameters"] > 0
    assert full.cost["bytes"] > of(report, "colours", "losa").cost["bytes"]
    assert full.point["lr"] in (1e-4, 3e-5)
    assert len(full.scores) == len(norms.scores) == 1
    assert all(one.claim.startswith("no claim: ") for one in report.comparisons[False])


def test_full_begins_at_the_pixels_of_a_backbone_of_ones_own(suite, tmp_path):
    own = build_backbone("toy", size=48)
    asked = request(suite, tmp_path, "full", against=(), seeds=1, equal_time=False)
    report = bench_accuracy(replace(asked, tasks=asked.tasks[:1]), own)
    trained = of(report, "colours", "full").cost["parameters"]
    assert trained == sum(one.numel() for one in own.module.parameters())


def test_a_backbone_that_gives_no_pixels_is_refused_before_anything_is_written(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(HookedBackbone, "reading", Backbone.reading)
    asked = request(suite, tmp_path, "losa,full", against=())
    with pytest.raises(BackboneError, match=r"reads the taps that it was built with, .* and got image"):
        bench_accuracy(asked)
    assert not (tmp_path / "out").exists()


def test_clips_train_side_networks_and_baselines_alike(tmp_path):
    """Of full fine-tuning frames are decoded for each batch, of all others they are stored."""
    clips, other = make_clips(tmp_path / "clips"), make_clips(tmp_path / "other")
    for file in sorted(other.glob("*/*.mkv")):
        file.write_bytes(file.read_bytes() + b"another clip")
    asked = request(
        clips,
        tmp_path,
        "ridge,losa,stadapter,full",
        settings=("clips.frames=2", "clips.stored=4", "train.lr=1e-2", "train.epochs=8"),
        seeds=1,
        grid_size=1,
        equal_time=False,
        also=(other,),
    )
    report = bench_accuracy(asked)
    counts = {one.method: one.cost["parameters"] for one in report.outcomes if one.method != "ridge"}
    assert all(counts.values()) and len(counts) == 3
    assert all(of(report, "clips", method).val > 0.6 for method in ("ridge", "losa", "stadapter", "full"))
    stored = json.loads(next((tmp_path / "stores").glob("*/plan.json")).read_text())
    assert "frame0of4" in json.dumps(stored), "frames are what is stored"


@pytest.fixture(scope="module")
def curves(suite, tmp_path_factory):
    """One task with few shots, and another task to answer for as well."""
    folder = tmp_path_factory.mktemp("curves")
    asked = request(suite, folder, "ridge,linear,losa", reveal=True, equal_time=False, shots=(1, 2))
    return bench_accuracy(replace(asked, tasks=asked.tasks[:1], also=(suite / "shapes",))), folder


def test_few_shots_are_drawn_by_the_seed_and_are_among_more(suite, tmp_path):
    how = Opening(Recipe.build(BASE), tmp_path, tmp_path / "stores", quiet=True)
    ground = open_ground(find_tasks(suite)[0], build_backbone("toy"), how)
    targets = ground.job.dataset.targets
    for shots in (1, 2, 4):
        rows = ground.shots(shots, 0)
        assert np.bincount(targets[rows]).tolist() == [shots] * 3
        assert set(rows) <= set(ground.shots(shots + 1, 0)) <= set(ground.rows)
    assert ground.shots(2, 0).tolist() != ground.shots(2, 1).tolist()
    assert len(ground.shots(100, 0)) == len(ground.rows) == 27


def test_every_method_has_a_score_for_every_number_of_shots(curves):
    report, folder = curves
    here = [one for one in report.shots if one.task == "colours"]
    assert {(one.method, one.shots) for one in here} == {
        (method, k) for method in ("ridge", "linear", "losa") for k in (1, 2)
    }
    assert all(one.seeds == (0, 1) and len(one.scores) == 2 for one in here)
    assert "colours/losa, 2 shots" in frozen(folder)
    text = "\n".join(report.lines())
    assert "k = 1" in text
    assert max(len(line) for line in report.lines() if "looks.jsonl" not in line) <= 80
    assert report.bench().row("colours/losa, 2 shots", "test_accuracy").value == pytest.approx(
        next(one.score for one in here if (one.method, one.shots) == ("losa", 2))
    )


def test_another_data_set_is_answered_for_with_its_own_labels(suite, curves):
    report, _ = curves
    one = of(report, "colours -> shapes", "losa")
    assert one.right_SN.shape == (2, 24) and not one.group
    assert one.recipe == of(report, "colours", "losa").recipe
    assert one.hashes != of(report, "colours", "losa").hashes
    assert {one.where for one in report.comparisons[False]} >= {"colours", "colours -> shapes"}


def test_classes_in_another_order_are_the_same_classes(suite, tmp_path):
    names = ["class2", "class0", "class1"]
    make_task(tmp_path / "turned", seed=1, names=names)  # what was class 0 is called class2 now
    asked = request(suite, tmp_path, "ridge", also=(tmp_path / "turned",), reveal=True, equal_time=False)
    report = bench_accuracy(replace(asked, tasks=asked.tasks[:1]))
    straight = replace(asked, tasks=asked.tasks[:1], also=(suite / "shapes",), out=tmp_path / "straight")
    other = bench_accuracy(straight)
    turned, plain = of(report, "colours -> turned", "ridge"), of(other, "colours -> shapes", "ridge")
    assert turned.hashes == plain.hashes, "the same images"
    assert (turned.right_SN & plain.right_SN).sum() == 0, "and all labels are others"


def test_other_classes_are_refused_with_the_difference(suite, tmp_path):
    make_task(tmp_path / "other", classes=2, names=["class0", "dog"])
    asked = request(suite, tmp_path, "ridge", also=(tmp_path / "other",))
    with pytest.raises(DataError, match=r"it lacks 'class1', 'class2'; only it has 'dog'"):
        bench_accuracy(replace(asked, tasks=asked.tasks[:1]))
    with pytest.raises(RequestError, match="--also-test is for one task, got 2"):
        bench_accuracy(asked)
    with pytest.raises(RequestError, match="--shots has 0"):
        bench_accuracy(replace(asked, also=(), shots=(0, 1)))


def test_a_name_that_is_answered_for_already_is_refused(suite, tmp_path):
    for folder in ("test", "one/same", "two/same"):
        make_task(tmp_path / folder, seed=2)
    asked = request(suite, tmp_path, "ridge")
    asked = replace(asked, tasks=asked.tasks[:1])
    with pytest.raises(RequestError, match=r"'test' is the name of the task's own test images"):
        bench_accuracy(replace(asked, also=(tmp_path / "test",)))
    with pytest.raises(RequestError, match=r"two/same: 'same' is the name of another data set"):
        bench_accuracy(replace(asked, also=(tmp_path / "one" / "same", tmp_path / "two" / "same")))


def test_images_that_are_learned_from_are_not_answered_for_elsewhere(image_folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    for file in sorted(image_folder.rglob("*.png")):
        (copy / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy / file.parent.name / f"copied-{file.name}")
    how = Opening(Recipe.build(BASE), tmp_path / "out", tmp_path / "stores", quiet=False)
    ground = open_ground(find_tasks(image_folder)[0], build_backbone("toy"), how)
    own = ground.tests["test"]
    copied = add_test(ground, copy, how).tests["copy"]
    assert len(copied.rows) == len(own.rows) > 0
    assert f"{len(ground.rows)} images are learned from" in capsys.readouterr().err
    for row in own.rows:
        file = ground.job.dataset.file(row)
        (copy / file.parent.name / f"copied-{file.name}").unlink()
    with pytest.raises(DataError, match=r"all of its \d+ images are learned from"):
        add_test(ground, copy, how)


def test_images_are_not_drawn_across_folds(image_folder, tmp_path):
    files = sorted(image_folder.rglob("*.png"))
    rows = [f"{file},{file.parent.name},{number % 5}" for number, file in enumerate(files)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,label,fold", *rows]) + "\n")
    how = Opening(Recipe.build(BASE), tmp_path / "out", tmp_path / "stores", quiet=True)
    with pytest.raises(DataError, match=r"Name it 'group', which keeps them whole, or add a column 's"):
        open_ground(TaskFolder(table), build_backbone("toy"), how)
    table.write_text("\n".join(["path,label,group", *rows]) + "\n")
    ground = open_ground(TaskFolder(table), build_backbone("toy"), how)
    split = ground.job.split
    groups = [set(ground.job.dataset.group[split[name]]) for name in ("train", "val", "test")]
    assert sum(map(len, groups)) == 5 and len(ground.choosing.folds) == 5 - len(groups[2])


def test_another_data_set_answers_live_where_views_are_drawn_from_keys(image_folder, tmp_path):
    copy = shutil.copytree(image_folder, tmp_path / "copy")
    for file in copy.rglob("*.png"):
        file.write_bytes(file.read_bytes() + b"another")
    recipe = Recipe.build(BASE, ["features.views=2"])
    how = Opening(recipe, tmp_path / "out", tmp_path / "stores", quiet=True)
    backbone = build_backbone("toy")
    ground = add_test(open_ground(find_tasks(image_folder)[0], backbone, how), copy, how)
    own = live_ground(ground, backbone).tests["copy"]
    stored = ground.tests["copy"].job.source
    rows = own.rows[:3].tolist()
    for got, wanted in zip(own.job.source.features(rows).layers, stored.features(rows).layers, strict=True):
        torch.testing.assert_close(got, wanted.float(), atol=2e-2, rtol=1e-2)


def test_a_picture_is_drawn_of_costs_and_curves(curves, hidden, tmp_path):
    for name, report in (("curves.png", curves[0]), ("hidden.svg", hidden[0])):
        draw(report, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5_000
    found = points(curves[0].outcomes, "parameters")
    assert [name for name, _, _ in found] == ["ridge", "linear", "losa"]
    own = [100 * of(curves[0], "colours", name).score for name, _, _ in found]
    assert [score for _, _, score in found] == pytest.approx(own), "other data sets are no tasks"
    assert pareto([("a", 1.0, 50.0), ("b", 2.0, 40.0), ("c", 3.0, 60.0)]) == [
        ("a", 1.0, 50.0),
        ("c", 3.0, 60.0),
    ]


def test_names_in_a_picture_do_not_touch():
    dots = np.array([[0.5, 0.5], [0.5, 0.51], [0.52, 0.99], [0.5, 1.0], [0.9, 0.5]])
    heights = apart(dots)
    near = np.sort(heights[:4])
    assert (np.diff(near) > 0.055).all() and near[-1] <= 1
    assert heights[4] == 0.5, "it stands alone"


def test_the_command_prints_the_tables_or_the_json(suite, hidden, tmp_path, capsys, monkeypatch):
    shutil.copytree(hidden[1], tmp_path / "run")
    words = ["bench", "accuracy", suite, "--methods", "ridge,losa", "--backbone", "toy", "--epochs", "2"]
    words += ["--seeds", "2", "--grid-size", "2", "--set", "train.batch_size=8", "--quiet"]
    words += ["--stores", tmp_path / "run" / "stores", "--out", tmp_path / "run" / "out"]
    words += ["--looks", tmp_path / "looks.jsonl", "--no-equal-time"]
    for more in ([], ["--reveal", "--json"]):
        monkeypatch.setattr("sys.argv", ["sidetune", *map(str, words + more)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        out = capsys.readouterr().out
        assert ("Type: the same command with --reveal" in out) == (not more)
    fields = json.loads(out.splitlines()[-1])
    known = {(one.task, one.method): list(one.hashes) for one in hidden[0].outcomes}
    for one in fields["outcomes"]:
        assert one["prediction_hashes"] == known[one["task"], one["method"]]


def test_requests_that_cannot_be(suite, tmp_path):
    for changed, match in (
        ({"grid_size": 9}, "--grid-size is 9"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"minutes": 0.0}, "--minutes is 0"),
        ({"against": ("lora",)}, "none of the methods"),
        ({"settings": ["train.select=best"]}, "last epoch"),
    ):
        with pytest.raises(RequestError, match=match):
            bench_accuracy(request(suite, tmp_path, **changed))
    with pytest.raises(RequestError, match=r"no method named 'lorra'\. Did you mean 'lora'"):
        parse_methods("losa,lorra")
    with pytest.raises(RequestError, match=r"no method named 'lossa'\. Did you mean 'losa'"):
        bench_accuracy(request(suite, tmp_path, "lossa", against=()))
    with pytest.raises(RecipeError, match=r"train\.lr is given, and each method's grid chooses it"):
        bench_accuracy(replace(request(suite, tmp_path), settings=("train.lr=0.1",)))
    with pytest.raises(RequestError, match="twice"):
        parse_methods("losa,losa")
    with pytest.raises(RequestError, match="NAME:SEEDS"):
        parse_methods("losa:0")
    with pytest.raises(RequestError, match=r"no task 'colour'.*Did you mean 'colours'"):
        find_tasks(suite, ["colour"])
    assert not (tmp_path / "out" / "frozen.json").exists()


def test_ridge_gets_its_share_without_a_point_of_the_grid(suite, tmp_path, monkeypatch):
    """The networks are those of the side alone: trained once, and the share is chosen beside them."""
    plain, shared = parse_methods("losa,losa+ridge")
    assert list(shared.points(4)) == list(plain.points(4))
    monkeypatch.setattr("sidetune.bench.accuracy.voices.best_share", lambda *_: 0.4)
    asked = request(suite, tmp_path, "losa,losa+ridge", grid_size=2, equal_time=False, against=())
    report = bench_accuracy(replace(asked, reveal=True))
    task = report.outcomes[0].task
    alone, both = (of(report, task, name) for name in ("losa", "losa+ridge"))
    assert both.point["ridge"] == 0.4 and "ridge" not in alone.point
    assert both.hashes != alone.hashes and both.recipe != alone.recipe
    files = {path.name.partition("-")[0] for path in asked.out.joinpath(task, "losa+ridge").iterdir()}
    assert files == {"ridge", "clock"}, "no network of its own"


def test_a_share_that_is_chosen_after_training_is_no_point_of_a_grid(suite, tmp_path):
    asked = request(suite, tmp_path, "losa", settings=["head.ridge=auto"], against=())
    with pytest.raises(RequestError, match=r"Type: --methods losa,losa\+ridge"):
        bench_accuracy(asked)


def test_ridge_has_no_share_in_what_does_not_train_beside_it():
    for name in ("lora+ridge", "ridge+ridge"):
        with pytest.raises(RequestError, match="Type: --methods losa"):
            parse_methods(name)


def test_a_baseline_in_bf16_trains_under_autocast_and_nothing_else_does():
    plain, short = parse_methods("lora-last3,lora-last3-bf16:2")
    base = Recipe.build(BASE)
    recipe = short.recipe(base)
    assert recipe.train.precision == "bf16" and short.seeds == 2
    assert recipe.side == plain.recipe(base).side and plain.recipe(base).train.precision == "auto"
    for name in ("losa-bf16", "ridge-bf16", "losa-bf16+ridge"):
        with pytest.raises(RequestError, match="bf16 is for baselines"):
            parse_methods(name)
    with pytest.raises(RequestError, match="share in what a trained side network"):
        parse_methods("lora-bf16+ridge")

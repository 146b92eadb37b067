"""Two voices: what a network and ridge answer together."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fitted_runs import read_csv, toy_recipe
from fleets import DATA, LAYERS, SPEC, TARGETS, TASK, build, member, recipe_of, run_all
from sidetune import fit, load
from sidetune.artifact import Artifact, build_model
from sidetune.blend import SHARES, Solved, best_share
from sidetune.bucket import Bucket, Member, Place
from sidetune.errors import RecipeError
from sidetune.features import Features
from sidetune.probes import Pooled, Probe, fit_ridge
from sidetune.recipe import FleetRecipe, Recipe
from sidetune.sides.ridge import Ridge, RidgeRecipe
from sidetune.summary import summarise
from sidetune.tasks import Classify

FEATURES, SHARE = Features(tuple(LAYERS), SPEC), 0.25


def probe(rows: np.ndarray, task: Classify = TASK, targets: torch.Tensor = TARGETS) -> Probe:
    nobody = np.zeros(0, np.int64)
    return fit_ridge(RidgeRecipe(), Pooled(summarise(FEATURES), targets, rows, nobody), task)


def solved(found: Probe) -> Solved:
    side, head = found.model.side, found.model.head
    assert isinstance(side, Ridge)
    return Solved(side.centre, side.spread, head.weight_MDK[0].detach(), head.bias_MK[0].detach())


def blended(name: str, rows: np.ndarray, share: float = SHARE) -> Member:
    recipe = recipe_of(epochs=3, batch_size=6, lr=1e-2)
    recipe = recipe.model_copy(update={"head": recipe.head.model_copy(update={"ridge": share})})
    return replace(member(recipe, name), rows=rows, ridge=solved(probe(rows)))


def test_outputs_are_the_weighted_mean_and_the_network_s_alone_in_training() -> None:
    model = Bucket([Place(blended("one", DATA.rows))], build, 2, DATA.rows).model.eval()
    with torch.no_grad():
        ridge, own = probe(DATA.rows).model(FEATURES), model.outputs(model.side(FEATURES))
        torch.testing.assert_close(model(FEATURES), (1 - SHARE) * own + SHARE * ridge)
        torch.testing.assert_close(model.train()(FEATURES), own)


def test_the_network_trains_as_it_would_without_ridge() -> None:
    one = blended("one", DATA.rows)
    plain = member(recipe_of(epochs=3, batch_size=6, lr=1e-2), "one")
    trained, other = run_all([one])["one"].model, run_all([plain])["one"].model
    assert trained is not None and other is not None
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, trained.get_parameter(name)), name


def test_members_of_folds_have_their_own_ridge_as_alone() -> None:
    folds = np.arange(30) % 3
    members = [blended(f"fold {k}", DATA.rows[folds != k]) for k in range(3)]
    together = run_all(members)
    for one in members:
        own, alone = together[one.name].model, run_all([one])[one.name].model
        assert own is not None and alone is not None and own.blend is not None and one.ridge is not None
        assert torch.equal(own.blend.weight_MFK[0], one.ridge.weight)
        torch.testing.assert_close(own(FEATURES), alone(FEATURES), rtol=1e-4, atol=1e-5)


def test_ridge_is_not_trained_and_a_narrow_member_keeps_its_outputs() -> None:
    three, of_three = torch.arange(40) % 3, Classify(("a", "b", "c"), (0.3, 0.3, 0.4))
    wide = blended("wide", DATA.rows)
    found = solved(probe(DATA.rows, of_three, three))
    wide = replace(wide, task=of_three, targets=three, ridge=found)
    narrow = blended("narrow", DATA.rows)
    bucket = Bucket([Place(wide), Place(narrow)], build, 3, DATA.rows)
    bucket.step(DATA.rows[:6], FEATURES.rows(slice(0, 6)), epoch=0, step=0, total=5)
    own = bucket.alone(1, build)
    assert own.blend is not None and narrow.ridge is not None
    assert torch.equal(own.blend.weight_MFK[0], narrow.ridge.weight)
    assert torch.equal(bucket.alone(0, build).get_parameter("blend.weight_MFK")[0], found.weight)


def test_a_saved_model_answers_with_both_voices() -> None:
    one = blended("one", DATA.rows)
    trained = run_all([one])["one"].model
    assert trained is not None
    loaded = build_model(one.recipe, SPEC, 2, None)
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(loaded.eval()(FEATURES), trained(FEATURES))


def test_a_recipe_without_ridge_keeps_its_hash() -> None:
    hashes = [Recipe.build({"head": head}).hash for head in ({}, {"ridge": 0.0}, {"ridge": 0.5})]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("fleet", [{}, {"folds": 2, "members": "seed=0,1"}], ids=["one", "folds"])
def test_a_run_with_ridge_answers_from_its_artifact_as_it_was_scored(
    pictures: Path, tmp_path: Path, fleet: dict[str, Any]
) -> None:
    recipe = toy_recipe("losa", "head.ridge=0.5", "features.dtype=fp32")
    recipe = recipe.model_copy(update={"fleet": FleetRecipe(**fleet)})
    run = fit(pictures, out=tmp_path / "run", recipe=recipe, store=tmp_path / "store", quiet=True)
    folder = run.folder if not fleet else next((run.folder / "members").iterdir())
    model = Artifact.read(folder).model
    assert model.blend is not None and model.blend.weight_MFK.abs().max() > 0
    predictor = load(run.folder)
    rows = read_csv(run.folder / "predictions.csv")
    assert rows
    for row in rows:
        (found,) = predictor.predict([pictures / row["path"]])
        assert found.label == row["predicted"]


def outputs_of(right: int, of: int, sure: float) -> torch.Tensor:
    """Two classes, the first of which is right: outputs (of, 2), so many of them for it."""
    output = torch.zeros(of, 2)
    output[:right, 0], output[right:, 1] = sure, sure
    return output


def test_the_best_share_is_that_of_the_better_voice_however_sure_the_other_is() -> None:
    target = torch.zeros(40, dtype=torch.int64)
    good, bad = outputs_of(38, 40, 2.0), outputs_of(22, 40, 30.0).flip(0)
    assert best_share(TASK, good, bad, target) == 0
    assert best_share(TASK, bad, good, target) == SHARES[-1]
    assert best_share(TASK, good, good, target) == 0, "of equals the smallest"


def test_voices_that_err_apart_share_the_answer() -> None:
    target = torch.zeros(40, dtype=torch.int64)
    one, other = outputs_of(30, 40, 2.0), outputs_of(30, 40, 2.0).flip(0)
    one[:30, 0] += torch.linspace(0, 4, 30)
    other[10:, 0] += torch.linspace(4, 0, 30)
    assert 0.2 < best_share(TASK, one, other, target) < 0.8


@pytest.mark.parametrize("fleet", [{}, {"folds": 2}, {"folds": 2, "members": "seed=0,1", "ensemble": True}])
def test_auto_trains_what_none_trains_and_answers_with_its_share_from_the_artifact(
    pictures: Path, tmp_path: Path, fleet: dict[str, Any]
) -> None:
    runs = {}
    for name in ("auto", "0"):
        recipe = toy_recipe("losa", f"head.ridge={name}", "features.dtype=fp32")
        recipe = recipe.model_copy(update={"fleet": FleetRecipe(**fleet)})
        runs[name] = fit(pictures, out=tmp_path / name, recipe=recipe, store=tmp_path / "store", quiet=True)
    folders = {
        name: [run.folder / row["folder"] for row in read_csv(run.folder / "members.csv")]
        if fleet
        else [run.folder]
        for name, run in runs.items()
    }
    if "ensemble" not in fleet:  # which members answer is chosen by what they answer
        for mine, plain in zip(folders["auto"], folders["0"], strict=True):
            model, other = (Artifact.read(folder).model for folder in (mine, plain))
            assert model.blend is not None and other.blend is None
            assert model.blend.share in {round(share, 2) for share in SHARES}
            for key, parameter in other.named_parameters():
                assert torch.equal(parameter, model.get_parameter(key)), key
    shares = {Artifact.read(folder).model.blend.share for folder in folders["auto"]}  # type: ignore[union-attr]
    assert "ensemble" in fleet or len(shares) == 1, "folds have one share"
    assert fleet or runs["auto"].row["detail"]["ridge"] in shares
    predictor = load(runs["auto"].folder)
    rows = [row for row in read_csv(runs["auto"].folder / "predictions.csv") if row["split"] == "test"]
    assert rows
    for row in rows:
        (found,) = predictor.predict([pictures / row["path"]])
        assert found.label == row["predicted"]
        for label, value in found.values.items():
            assert value == pytest.approx(float(row[f"p_{label}"]), abs=1e-4)


@pytest.mark.parametrize("share", ["autoo", "1", "-0.1", "[0.5]"])
def test_a_share_that_is_none_is_refused_with_what_it_can_be(share: str) -> None:
    with pytest.raises(RecipeError, match=r"head\.ridge is .*, expected 0 or more and below 1, or auto"):
        Recipe.build({}, [f"head.ridge={share}"])

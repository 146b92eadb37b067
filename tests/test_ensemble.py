"""Several sides that answer as one: stacked as each alone, chosen greedily, and read with care."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from fitted_fleets import FOLDS, values_of
from fitted_runs import read_csv, toy_recipe
from fleets import DATA, SPEC, TASK, build, inputs, recipe_of
from sidetune import fit, load
from sidetune.artifact import Artifact
from sidetune.data import load_dataset
from sidetune.ensemble import Committee, Ensemble, Voice
from sidetune.errors import ArtifactError
from sidetune.evaluate import evaluate
from sidetune.files import sha256_file
from sidetune.keyed import Draws, generator
from sidetune.rescore import evaluate_run
from sidetune.selection import select_greedily

CPU = torch.device("cpu")


def voice(side="losa", number=0, weight=1.0, **recipe):
    """A side whose parameters are all drawn, on the tiny fleet's taps."""
    described = recipe_of(side, **recipe)
    model = build([described], 2)
    keyed = generator(number, "voice")
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=keyed)
    return Voice(model.eval(), described, TASK, temperature=1.0 + number, weight=weight)


# a committee


def test_a_committee_says_of_every_voice_what_it_says_alone():
    sides = ("losa", "last", "losa", "last")
    voices = [voice(side, number) for number, side in enumerate(sides)]
    voices.append(voice("losa", 4, drop_path=0.3))
    other = voice("losa", 5)
    other.model.side.tap_scale.fill_(2.0)
    voices.append(other)
    features = inputs(range(7), SPEC, Draws([0]))
    committee = Committee(voices, CPU)
    assert len(committee._stacks) == 3, "losa with and without another scale of taps, and last"
    assert committee.taps == frozenset(SPEC.names)
    with torch.no_grad():
        found = committee.outputs(features)
        assert found.shape == (6, 7, 2)
        for output, one in zip(found, voices, strict=True):
            torch.testing.assert_close(output, one.model(features)[0], rtol=1e-5, atol=1e-5)


def test_what_a_committee_predicts_is_the_softmax_of_the_weighted_mean_of_outputs():
    voices = [voice("losa", 0, 0.5), voice("last", 1, 0.2), voice("losa", 2, 0.3)]
    features = inputs(range(9), SPEC, Draws([0]))
    committee = Committee(voices, CPU)
    with torch.no_grad():
        found = committee.predictions(committee.outputs(features))
        scaled = [one.weight * one.model(features)[0].double() / one.temperature for one in voices]
        by_hand = torch.softmax(sum(scaled), 1)
    torch.testing.assert_close(found.double(), by_hand, rtol=1e-5, atol=1e-6)


def test_one_voice_is_itself_to_the_bit():
    one = voice("losa", 3)
    features = inputs(DATA.rows.tolist(), SPEC, Draws([0]))
    committee = Committee([one], CPU)
    with torch.no_grad():
        found = committee.predictions(committee.outputs(features))
        assert torch.equal(found, TASK.predictions(one.model(features)[0] / one.temperature))


def test_a_committee_leaves_its_members_as_they_are():
    voices = [voice("losa", 0), voice("losa", 1)]
    before = [[parameter.clone() for parameter in one.model.parameters()] for one in voices]
    Committee(voices, CPU)
    for one, tensors in zip(voices, before, strict=True):
        assert one.model.side.members == 1
        assert all(torch.equal(*pair) for pair in zip(one.model.parameters(), tensors, strict=True))


def test_a_run_of_one_is_an_ensemble_of_one(runs):
    ensemble = Ensemble.read(runs().folder)
    (seat,) = ensemble.seats
    assert (seat.folder, seat.weight) == (".", 1.0)
    assert ensemble.scores == runs().artifact().scores


# who is chosen


def test_an_ensemble_has_the_weights_of_the_greedy_selection(ensemble):
    table, dataset = read_csv(ensemble.table), ensemble.dataset()
    held = [row for row in table if row["split"] != "test"]
    targets = dataset.targets[[row["split"] != "test" for row in table]]
    images = [ensemble.table.parent / row["path"] for row in held]
    found, weights = {}, {}
    for row in ensemble.members():
        name = row["member"].rpartition(" ")[0]
        own = np.array([one["fold"] == row["fold"] for one in held])
        values = found.setdefault(name, np.zeros((len(held), 3)))
        predictor = load(ensemble.folder / row["folder"])
        values[own] = values_of(predictor, images)[own]
        weights[name] = weights.get(name, 0.0) + float(row["weight"])
    counts = select_greedily(np.stack(list(found.values())), targets, predictor.artifact.task)
    assert list(weights.values()) == pytest.approx((counts / counts.sum()).tolist(), abs=1e-5)
    assert len([weight for weight in weights.values() if weight]) > 1, "more than one was chosen"
    assert ensemble.run.row["method"] == f"ensemble of {2 * FOLDS}"
    least = min(one["scores"]["log_loss"] for one in ensemble.run.metrics["fleet"]["members"])
    assert ensemble.run.metrics["fleet"]["held_out"]["scores"]["log_loss"] < least


def test_the_costs_of_an_ensemble_are_those_of_all_that_answer(ensemble):
    seats = Ensemble.read(ensemble.folder).seats
    cost, own = ensemble.run.metrics["cost"], ensemble.run.row
    assert cost["parameters"] == own["parameters"] == sum(s.artifact.model.num_parameters() for s in seats)
    heads = [parameter.numel() for seat in seats for parameter in seat.artifact.model.head.parameters()]
    assert cost["head_parameters"] == sum(heads)
    assert own["detail"] == {"networks_trained": 4 * FOLDS, "temperature": 1.0}


def test_an_ensemble_is_one_row_of_scores_and_is_scored_again_alike(ensemble):
    found = evaluate_run(ensemble.folder, ensemble.table)
    assert (found.split, found.evaluation.num_samples) == ("test", 12)
    assert found.evaluation.scores == pytest.approx(ensemble.run.row["test"]["scores"], abs=1e-3)
    rows = read_csv(ensemble.folder / "predictions.csv")
    values = np.array(
        [[float(row[f"p_class{k}"]) for k in range(3)] for row in rows if row["split"] == "test"]
    )
    dataset = load_dataset(ensemble.table, task="classify")
    again = evaluate(
        Ensemble.read(ensemble.folder).artifact.task, values, dataset.targets[dataset.rows("test")]
    )
    assert again.scores == pytest.approx(ensemble.run.row["test"]["scores"], abs=1e-4)


# an ensemble on disk


def test_read_gives_what_was_saved(ensemble, tmp_path):
    first = Ensemble.read(ensemble.folder)
    assert len(first.seats) == 2 * FOLDS and sum(seat.weight for seat in first.seats) == pytest.approx(1)
    assert {row["folder"]: float(row["weight"]) for row in ensemble.members() if float(row["weight"])} == {
        seat.folder: pytest.approx(seat.weight, abs=1e-5) for seat in first.seats
    }
    folder = ensemble.copy(tmp_path / "copy")
    (folder / "artifact.json").unlink()
    first.save(folder)
    assert (folder / "artifact.json").read_bytes() == (ensemble.folder / "artifact.json").read_bytes()
    assert first.scores["test"] == ensemble.run.row["test"]["scores"]


def test_every_member_answers_alone_and_the_ensemble_is_no_artifact(ensemble):
    with pytest.raises(ArtifactError, match=r"holds an ensemble, expected one side. Type: sidetune predict"):
        ensemble.run.artifact()
    for row in ensemble.members():
        artifact = Artifact.read(ensemble.folder / row["folder"])
        assert artifact.temperature == pytest.approx(float(row["temperature"]), rel=1e-4)


def edited(folder, **fields):
    path = folder / "artifact.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def first_member(folder):
    return json.loads((folder / "artifact.json").read_text())["members"][0]["folder"]


def missing(folder):
    shutil.rmtree(folder / first_member(folder))


def exchanged(folder):
    members = [one["folder"] for one in json.loads((folder / "artifact.json").read_text())["members"]]
    shutil.copy(folder / members[1] / "artifact.json", folder / members[0] / "artifact.json")


def exchanged_weights(folder):
    members = [one["folder"] for one in json.loads((folder / "artifact.json").read_text())["members"]]
    shutil.copy(folder / members[1] / "side.safetensors", folder / members[0] / "side.safetensors")


def damaged(folder):
    path = folder / first_member(folder) / "side.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))


def changed_members(run, /, **fields):
    members = json.loads((run / "artifact.json").read_text())["members"]
    edited(run, members=[{**members[0], **fields}, *members[1:]])


def outside(folder):
    elsewhere = folder.parent / "elsewhere"
    shutil.copytree(folder / first_member(folder), elsewhere)
    changed_members(folder, folder="../elsewhere", artifact=sha256_file(elsewhere / "artifact.json"))


def unlike(folder):
    own = folder / first_member(folder)
    edited(own, task=json.loads((own / "artifact.json").read_text())["task"] | {"outputs": ["x", "y", "z"]})
    changed_members(folder, artifact=sha256_file(own / "artifact.json"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "artifact.json is missing, and .* needs it. Copy the whole run folder again"),
        (exchanged, "artifact.json was exchanged, and .* needs it. Copy"),
        (exchanged_weights, "side.safetensors is damaged or was exchanged"),
        (damaged, "side.safetensors is damaged or was exchanged"),
        (outside, "its member '../elsewhere' is elsewhere. Copy"),
        (unlike, "its members have different backbones, tasks or outputs. Copy"),
        (lambda folder: edited(folder, members=[]), "is damaged, or of another version"),
        (lambda folder: edited(folder, members="all"), "is damaged, or of another version"),
        (lambda folder: changed_members(folder, weight=-0.1), "is damaged, or of another version"),
        (lambda folder: changed_members(folder, weight=0.9), "weights sum to .*, expected 1"),
        (lambda folder: changed_members(folder, folder=3), "is damaged, or of another version"),
        (lambda folder: edited(folder, format=4), "has format 4, expected 2 or 3. Type: pip install -U"),
    ],
)
def test_an_ensemble_that_is_not_whole_is_refused(ensemble, tmp_path, damage, message):
    folder = ensemble.copy(tmp_path / "copy")
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


def test_members_on_different_backbones_are_refused(ensemble, tmp_path):
    folder = ensemble.copy(tmp_path / "copy")
    seats = list(Ensemble.read(folder).seats)
    other = replace(seats[0].artifact.identity, weights="0" * 64)
    replace(seats[0].artifact, identity=other).save(folder / seats[0].folder)
    changed_members(folder, artifact=sha256_file(folder / seats[0].folder / "artifact.json"))
    with pytest.raises(ArtifactError, match="its members have different backbones"):
        Ensemble.read(folder)


def test_views_are_averaged_before_temperature_and_mean(image_folder, tmp_path, ensemble):
    shown = [ensemble.table.parent / row["path"] for row in read_csv(ensemble.table)[:4]]
    plain, more = load(ensemble.folder), load(ensemble.folder, num_views=2)
    ours = values_of(more, shown)
    theirs = values_of(plain, shown)
    assert np.allclose(ours.sum(1), 1, atol=1e-5) and np.abs(ours - theirs).max() > 1e-4
    recipe = toy_recipe("losa", "features.views=2", "features.average_views=true", "features.dtype=fp32")
    fields = recipe.model_dump(mode="json") | {"fleet": {"members": "lr=0.01,0.03", "ensemble": True}}
    run = fit(
        image_folder, out=tmp_path / "run", recipe=recipe.build(fields), store=tmp_path / "s", quiet=True
    )
    found = evaluate_run(run.folder, image_folder)
    assert found.evaluation.scores == pytest.approx(run.row["test"]["scores"], abs=1e-3)

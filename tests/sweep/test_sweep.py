import csv
import importlib
import json
import re

import numpy as np
import pytest

from column_runs import recipe as columns_recipe
from column_runs import write_table
from fitted_runs import conv_net, snapshot, toy_recipe
from images import make_csv
from sidetune import Run, evaluate, fit, fit_columns, load, wrap
from sidetune.data.preprocess import Preprocess
from sidetune.errors import ArtifactError, DivergedError, MissingExtraError, RecipeError, RequestError
from sidetune.recipe import Recipe
from sidetune.rescore import evaluate_run
from sidetune.sides.losa import Losa
from sidetune.sweep.score import Score
from sweeps import EPOCHS, TRIALS, small_sweep

MODULE = importlib.import_module("sidetune.sweep")  # `sidetune.sweep` is the function


@pytest.fixture(scope="module")
def done(tmp_path_factory, image_folder) -> Run:
    """A finished sweep. Read only."""
    return small_sweep(image_folder, tmp_path_factory.mktemp("sweeps"))


def read(run, name):
    return json.loads((run.folder / name).read_text())


def test_a_sweep_has_the_documented_files(done):
    table = re.findall(r"^    RUN/(.*?)  ", MODULE.__doc__, re.MULTILINE)
    documented = {name for line in table for name in line.split(", ")} - {"workers/"}
    assert {path.name for path in done.folder.iterdir() if not path.name.startswith(".")} == documented


def test_the_first_trial_is_the_recipe_as_given_and_is_trained_to_its_end(done):
    first = read(done, "sweep.json")["trials"][0]
    assert first["params"] == {
        "side.rank": 8, "train.lr": 1e-3, "train.total_decay": 2.0, "side.drop_path": 0.0,
        "data.label_smoothing": 0.0,
    }  # fmt: skip
    assert (first["state"], first["epochs"]) == ("finished", EPOCHS)


def test_every_trial_is_another_recipe_and_some_are_stopped(done):
    found = read(done, "sweep.json")
    assert [trial["number"] for trial in found["trials"]] == list(range(TRIALS))
    assert len({json.dumps(trial["params"], sort_keys=True) for trial in found["trials"]}) == TRIALS
    assert found["rungs"] == [1, 4]
    states = [trial["state"] for trial in found["trials"]]
    assert "stopped" in states and set(states) <= {"stopped", "finished"}
    for trial in found["trials"]:
        assert trial["epochs"] == (EPOCHS if trial["state"] == "finished" else 1)
        assert list(trial["scores"]) == [str(rung) for rung in found["rungs"] if rung <= trial["epochs"]]
    trained = sum(trial["epochs"] for trial in found["trials"])
    assert found["cost"]["epochs_share"] == trained / (TRIALS * EPOCHS)


def test_the_winner_is_the_best_that_was_trained_to_its_end_and_not_below_the_default(done):
    found = read(done, "sweep.json")
    last = {
        trial["number"]: Score.from_json(trial["scores"][str(EPOCHS)]).value
        for trial in found["trials"]
        if trial["state"] == "finished"
    }
    assert last[found["winner"]] == max(last.values()) >= last[0]
    default, winner = done.metrics["rows"]
    assert (default["method"], winner["method"]) == ("default", "winner")
    assert winner["detail"]["trial"] == found["winner"]
    assert winner["val"]["scores"]["balanced_accuracy"] >= default["val"]["scores"]["balanced_accuracy"]
    assert winner["val"]["num_samples"] == found["held"] == 48
    assert winner["test"]["num_samples"] == 12


def test_the_held_out_score_of_a_trial_is_that_of_its_predictions(done, image_folder):
    """Every image of train and val is scored by the member that did not train on it."""
    found = read(done, "sweep.json")
    with (done.folder / "predictions.csv").open(newline="") as stream:
        table = [row for row in csv.DictReader(stream) if row["split"] == "folds"]
    assert len({row["path"] for row in table}) == len(table) == 48
    values = np.array([[float(row[f"p_class{k}"]) for k in range(3)] for row in table])
    targets = np.array([int(row["label"].removeprefix("class")) for row in table])
    task = done.artifact().task
    own = evaluate(task, values / values.sum(1, keepdims=True), targets, intervals=False).scores
    assert own["balanced_accuracy"] == pytest.approx(
        found["trials"][found["winner"]]["scores"][str(EPOCHS)][0]
    )


def test_the_winner_is_trained_on_train_and_validation_and_served(done, image_folder):
    artifact = done.artifact()
    found = read(done, "sweep.json")
    won = found["trials"][found["winner"]]["params"]
    assert isinstance(artifact.model.side, Losa)
    assert artifact.recipe.train.lr == won["train.lr"]
    assert artifact.recipe.side.rank == won["side.rank"]
    assert artifact.recipe.train.epochs == EPOCHS
    again = evaluate_run(done.folder, image_folder)
    assert again.split == "test"
    assert again.evaluation.scores == pytest.approx(done.row["test"]["scores"], abs=1e-3)
    file = image_folder / "class0" / "0000.png"
    assert set(load(done.folder).predict([file])[0].values) == {"class0", "class1", "class2"}


def test_the_difference_on_test_is_that_of_the_two_rows(done):
    found = read(done, "sweep.json")["difference"]
    default, winner = (row["test"]["scores"]["balanced_accuracy"] for row in done.metrics["rows"])
    assert (found["split"], found["metric"]) == ("test", "balanced_accuracy")
    assert found["value"] == pytest.approx(winner - default)
    assert found["interval"][0] <= found["value"] <= found["interval"][1]


def test_importances_are_shares(done):
    found = read(done, "sweep.json")["importance"]
    assert found.keys() <= read(done, "sweep.json")["space"].keys()
    assert sum(found.values()) == pytest.approx(1.0)


def test_the_same_command_on_a_finished_sweep_changes_nothing(done, image_folder):
    before = snapshot(done.folder)
    again = small_sweep(image_folder, done.folder.parent)
    assert again.metrics == done.metrics
    assert snapshot(done.folder) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"trials": 7}, "trials is 6 there and 7 here"),
        ({"places": 2}, "places is 3 there and 2 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"folds": None, "on": "val"}, 'on is "folds" there and "val" here'),
        ({"recipe": toy_recipe("losa", "train.epochs=5")}, "train.epochs is 4 there and 5 here"),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused(done, image_folder, changed, said):
    with pytest.raises(ArtifactError, match=re.escape(said)):
        small_sweep(image_folder, done.folder.parent, **changed)


def test_a_fit_does_not_write_into_a_sweep_nor_a_sweep_into_a_fit(done, image_folder, runs, tmp_path):
    with pytest.raises(ArtifactError, match="it is a sweep"):
        fit(image_folder, out=done.folder, recipe=toy_recipe(), quiet=True)
    with pytest.raises(ArtifactError, match="it is a run of `sidetune fit`"):
        small_sweep(image_folder, runs.copy(tmp_path / "run").parent, "run")


def test_a_sweep_does_not_write_into_runs_of_label_columns(image_folder, tmp_path):
    table = write_table(tmp_path / "table", sparse=False)
    several = fit_columns(table, out=tmp_path / "run", recipe=columns_recipe("train.epochs=1"), quiet=True)
    before = (several.folder / "recipe.json").read_bytes()
    with pytest.raises(ArtifactError, match="it is a run of `sidetune fit`"):
        small_sweep(image_folder, tmp_path, "run")
    assert (several.folder / "recipe.json").read_bytes() == before


def test_the_validation_split_may_choose(image_folder, tmp_path):
    run = small_sweep(image_folder, tmp_path, folds=None, on="val", trials=3)
    found = read(run, "sweep.json")
    assert (found["on"], found["members"], found["held"]) == ("val", 1, 12)
    assert run.row["val"]["num_samples"] == 12
    assert "Validation" in (run.folder / "report.html").read_text()


@pytest.mark.parametrize("task", ["multilabel", "regress"])
def test_other_tasks_are_swept_too(task, tmp_path):
    table = make_csv(tmp_path / "data", task, 60)
    labels = {"multilabel": ["coloured", "right"], "regress": ["x", "y"]}[task]
    fields = {
        "backbone": {"name": "toy"}, "data": {"task": task, "labels": labels}, "train": {"epochs": EPOCHS},
    }  # fmt: skip
    run = small_sweep(table, tmp_path, recipe=Recipe.build(fields), trials=4)
    found = read(run, "sweep.json")
    assert ("data.label_smoothing" in found["space"]) == (task == "multilabel")
    assert found["headline"] == {"multilabel": "auroc", "regress": "r2"}[task]
    held = [Score.from_json(scores) for trial in found["trials"] for scores in trial["scores"].values()]
    assert all(np.isfinite(score.value) for score in held)
    if task == "regress":  # the loss is in standard deviations: 1 for the mean, whatever the fold's own scale
        assert found["trials"][0]["scores"][str(EPOCHS)][1] == pytest.approx(
            1 - found["trials"][0]["scores"][str(EPOCHS)][0], abs=0.15
        )


def test_a_recipe_that_diverges_is_passed_over(image_folder, tmp_path):
    search = tmp_path / "search.yaml"
    search.write_text("train.lr: [1e-3, 1e30]\nside.a: [1.0, 2.0]\n")
    run = small_sweep(image_folder, tmp_path, search=search, trials=8)
    trials = read(run, "sweep.json")["trials"]
    states = {trial["params"]["train.lr"]: trial["state"] for trial in trials}
    assert states[1e30] == "diverged" and states[1e-3] != "diverged"
    assert all(trial["epochs"] == 0 for trial in trials if trial["state"] == "diverged")
    assert run.row["test"] is not None


def test_a_sweep_of_nothing_but_divergence_says_so(image_folder, tmp_path):
    search = tmp_path / "search.yaml"
    search.write_text("train.lr: {log: [1e29, 1e30]}\n")
    recipe = toy_recipe("losa", "train.epochs=2", "train.lr=1e30", "train.clip_norm=null")
    with pytest.raises(DivergedError, match=r"all 2 trials diverged\. Type: sidetune sweep"):
        small_sweep(image_folder, tmp_path, recipe=recipe, search=search, trials=2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"trials": 1}, "--trials is 1, expected 2 or more"),
        ({"places": 0}, "--places is 0, expected 1 or more"),
        ({"folds": 1}, "--folds is 1, expected 2 or more"),
        ({"on": "val"}, "got --on val and --folds 2"),
        ({"on": "test"}, "--on is 'test'. Known: folds, val."),
        ({"folds": 49}, "folds"),
        ({"folds": "few"}, "--folds is 'few', expected 2 or more, or column"),
        ({"folds": "column"}, "has no column 'fold'"),
        (
            {"recipe": toy_recipe("losa", "fleet.members=lr=1e-3,3e-3")},
            "a trial of a sweep is one network a fold",
        ),
        ({"recipe": toy_recipe("losa", "train.select=best")}, "train.select is 'best'"),
        ({"device": "gpu"}, "no device named 'gpu'"),
    ],
)
def test_a_bad_request_is_said(image_folder, tmp_path, changed, said):
    with pytest.raises(RequestError, match=re.escape(said)):
        small_sweep(image_folder, tmp_path, **changed)
    assert not (tmp_path / "sweep" / "journal.log").exists()


def test_a_solved_side_is_refused_before_anything_is_written(image_folder, tmp_path):
    with pytest.raises(RecipeError, match="is solved, not trained"):
        small_sweep(image_folder, tmp_path, recipe=toy_recipe("ridge"))
    assert not (tmp_path / "sweep").exists()


def test_pooling_that_the_backbone_does_not_have_is_refused(image_folder, tmp_path):
    search = tmp_path / "search.yaml"
    search.write_text("side.pool: [mean, cls]\n")
    backbone = wrap(conv_net(), {"block.1": "0"}, preprocess=Preprocess(size=32))
    with pytest.raises(RequestError, match="needs a class token"):
        small_sweep(image_folder, tmp_path, recipe=Recipe(), search=search, backbone=backbone)


def test_without_optuna_the_command_that_brings_it_is_said(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'sidetune[sweep]'")):
        small_sweep(image_folder, tmp_path)


def test_the_folds_of_a_table_may_choose(tmp_path):
    table = make_csv(tmp_path / "data", "classify", 60)
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["path", "label", "fold"])
        writer.writeheader()
        writer.writerows({**row, "fold": number // 3 % 3} for number, row in enumerate(rows))
    run = small_sweep(table, tmp_path, folds="column", trials=3)
    found = read(run, "sweep.json")
    assert (found["on"], found["members"], found["held"]) == ("folds", 3, 48)


def test_places_that_may_not_fit_into_memory_are_said(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MODULE, "device_memory", lambda device: 1000)
    run = small_sweep(image_folder, tmp_path, trials=2, quiet=False)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"3 places take about [\d.]+ [KM]iB .* type: --places 1 with a new --out", said)
    assert run.row["method"] == "winner"

"""Runs of several networks: each as if alone, held-out samples unseen, and the answer as it is said."""

import importlib
import json
import shutil

import numpy as np
import pytest
import torch

import column_runs
import sidetune.fleet_fit
import sidetune.methods
import sidetune.side_fit
import sidetune.waves
from fitted_fleets import FOLDS, SETTINGS, fleet_recipe, values_of, write_table
from fitted_runs import read_csv, snapshot, toy_recipe
from images import make_csv
from sidetune import Run, fit, load
from sidetune.artifact import Artifact
from sidetune.errors import ArtifactError, DataError, DivergedError, RecipeError, SideError
from sidetune.evaluate import scores
from sidetune.members import variations
from sidetune.rescore import evaluate_run

MODULE = importlib.import_module("sidetune.fit")  # `sidetune.fit` is the function
OPENING = importlib.import_module("sidetune.opening")


@pytest.fixture(autouse=True)
def without_probes(monkeypatch):
    """The opponents take longer than a fleet here, and have tests of their own."""
    monkeypatch.setattr(sidetune.methods, "_solve_probes", lambda job: iter(()))


@pytest.fixture
def stored(runs):
    """A store of the images' features in full precision."""
    runs(dtype="fp32")
    return runs.root / "store-fp32"


def fit_members(data, out, store, members, *settings, **fleet):
    recipe = fleet_recipe(members, *settings, **fleet)
    return fit(data, out=out, recipe=recipe, store=store, quiet=True)


def artifacts(run):
    """Member -> its artifact."""
    table = read_csv(run.folder / "members.csv")
    return {row["member"]: Artifact.read(run.folder / row["folder"]) for row in table if row["folder"]}


def weights_of(artifact):
    return torch.cat([tensor.flatten() for tensor in artifact.model.state_dict().values()])


# members


def test_every_member_is_what_a_run_of_its_recipe_alone_would_be(image_folder, stored, tmp_path):
    members = "side=losa,last;seed=0,1;epochs=2,3"
    settings = ("train.lr=0.01", "train.batch_size=10", "train.order_seed=0")
    run = fit_members(image_folder, tmp_path / "run", stored, members, *settings)
    found = artifacts(run)
    varied = variations(fleet_recipe(members, *settings))
    assert {one.label for one in varied} == set(found) and len(found) == 8
    for number, one in enumerate(varied):
        solo = fit(image_folder, out=tmp_path / str(number), recipe=one.recipe, store=stored, quiet=True)
        ours, theirs = found[one.label], solo.artifact()
        assert ours.recipe == theirs.recipe and ours.recipe.hash == one.recipe.hash == solo.recipe_hash
        assert (ours.task, ours.data, ours.identity) == (theirs.task, theirs.data, theirs.identity)
        torch.testing.assert_close(weights_of(ours), weights_of(theirs), rtol=1e-3, atol=1e-4)
        assert ours.temperature == pytest.approx(theirs.temperature, rel=1e-3)
        assert ours.scores["val"] == pytest.approx(theirs.scores["val"], abs=1e-3)


def test_the_best_on_validation_answers_as_a_run_of_it_alone(image_folder, stored, tmp_path):
    run = fit_members(image_folder, tmp_path / "run", stored, "lr=1e-4,0.03;seed=0,1")
    table = read_csv(run.folder / "members.csv")
    chosen = [row for row in table if float(row["weight"])]
    assert [float(row["weight"]) for row in table] == [1, 0, 0, 0]
    by_score = [float(row["balanced_accuracy"]) for row in table]
    assert by_score == sorted(by_score, reverse=True)
    own = Artifact.read(run.folder / chosen[0]["folder"])
    torch.testing.assert_close(weights_of(run.artifact()), weights_of(own), rtol=0, atol=0)
    assert run.artifact().recipe == own.recipe and run.artifact().temperature == own.temperature
    assert run.row["method"] == run.metrics["side"] == "losa"
    assert run.row["detail"]["member"] == chosen[0]["member"] and run.row["detail"]["networks_trained"] == 4
    assert run.row["val"]["scores"]["balanced_accuracy"] == pytest.approx(by_score[0], abs=1e-6)
    assert run.metrics["fleet"]["held_out"]["scores"] == pytest.approx(run.row["val"]["scores"], abs=1e-4)
    found = evaluate_run(run.folder, image_folder)
    assert found.evaluation.scores == pytest.approx(run.row["test"]["scores"], abs=1e-3)


def test_each_member_keeps_its_own_best_epoch(image_folder, stored, tmp_path):
    run = fit_members(
        image_folder, tmp_path / "r", stored, "lr=0.03,1e-3;seed=0,1", "train.select=best", "train.epochs=5"
    )
    for row in read_csv(run.folder / "members.csv"):
        folder = run.folder / row["folder"]
        lines = (folder / "history.jsonl").read_text().splitlines()
        history = [json.loads(line)["val"]["balanced_accuracy"] for line in lines]
        assert len(history) == int(row["epochs"]) == 5
        assert float(row["balanced_accuracy"]) == pytest.approx(max(history), abs=1e-6)


def test_live_features_train_what_stored_ones_do(image_folder, stored, tmp_path):
    members = "side=losa,last;lr=0.01"
    ours = fit_members(image_folder, tmp_path / "a", stored, members, ensemble=True)
    live = fit_members(image_folder, tmp_path / "b", None, members, "features.mode=live", ensemble=True)
    for name, artifact in artifacts(live).items():
        torch.testing.assert_close(
            weights_of(artifact), weights_of(artifacts(ours)[name]), rtol=1e-3, atol=1e-3
        )
    assert live.metrics["cost"]["store_bytes"] is None


def test_waves_end_where_one_pass_ends(image_folder, stored, tmp_path, monkeypatch, capsys):
    members = "lr=0.01,0.02,0.03;seed=0,1"
    whole = fit_members(image_folder, tmp_path / "a", stored, members, ensemble=True)
    monkeypatch.setattr(sidetune.waves, "total_memory", lambda: 4 * 1_000_000)
    recipe = fleet_recipe(members, ensemble=True)
    parts = fit(image_folder, out=tmp_path / "b", recipe=recipe, store=stored)
    assert "training 6 members in 3 passes of 2 at most: all would take" in capsys.readouterr().err
    ours, theirs = artifacts(parts), artifacts(whole)
    for name in theirs:
        torch.testing.assert_close(weights_of(ours[name]), weights_of(theirs[name]), rtol=1e-4, atol=1e-5)
    assert [row["weight"] for row in read_csv(parts.folder / "members.csv")] == [
        row["weight"] for row in read_csv(whole.folder / "members.csv")
    ]


def test_seeds_with_their_own_orders_read_other_batches(image_folder, stored, tmp_path):
    run = fit_members(image_folder, tmp_path / "a", stored, "seed=0,1", own_order=True)
    shared = fit_members(image_folder, tmp_path / "b", stored, "seed=0,1")
    first, second = (
        [weights_of(artifacts(one)[name]) for one in (run, shared)] for name in ("seed=0", "seed=1")
    )
    torch.testing.assert_close(*first, rtol=1e-3, atol=1e-4)
    assert (second[0] - second[1]).abs().max() > 1e-3


# members that diverge


def test_a_member_that_diverges_is_dropped_and_named(image_folder, stored, tmp_path, capsys):
    recipe = fleet_recipe("lr=0.01,1e30", ensemble=True)
    run = fit(image_folder, out=tmp_path / "run", recipe=recipe, store=stored)
    said = capsys.readouterr().err
    assert "lr=1e30 diverged at epoch 0" in said and "lr=1e30 has diverged and cannot be chosen" in said
    first, last = read_csv(run.folder / "members.csv")
    assert (last["member"], last["loss"], last["weight"], last["folder"]) == ("lr=1e30", "diverged", "0", "")
    assert (first["member"], first["weight"]) == ("lr=0.01", "1")
    assert len(list((run.folder / "members").iterdir())) == 1
    alone = fit_members(image_folder, tmp_path / "alone", stored, "lr=0.01")
    both = [weights_of(one.artifact()) for one in (run, alone)]
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-4)
    assert [(m["member"], m["diverged"], m["scores"] is None) for m in run.metrics["fleet"]["members"]] == [
        ("lr=0.01", 0, False),
        ("lr=1e30", 1, True),
    ]


def test_if_all_diverge_nothing_is_written(image_folder, stored, tmp_path):
    with pytest.raises(DivergedError, match=r"every member diverged. Type: --set train.lr=3e-4, or lower"):
        fit_members(image_folder, tmp_path / "run", stored, "lr=1e30,1e31")
    assert not (tmp_path / "run" / "artifact.json").exists()


@pytest.mark.parametrize("how", ["dropped", "ruined by the last update"])
def test_a_variation_needs_all_its_folds(image_folder, stored, tmp_path, monkeypatch, how):
    def train(*arguments, **more):
        trained = real(*arguments, **more)
        one = trained["seed=1 fold=2"]
        if how == "dropped":
            return trained | {"seed=1 fold=2": sidetune.fleet_fit.Trained(None, one.history)}
        one.model.head.bias_MK.data.fill_(torch.nan)
        return trained

    real = sidetune.side_fit.train
    monkeypatch.setattr(sidetune.side_fit, "train", train)
    run = fit_members(image_folder, tmp_path / "run", stored, "seed=0,1", folds=3)
    table = read_csv(run.folder / "members.csv")
    assert [row["member"] for row in table if float(row["weight"])] == [f"seed=0 fold={k}" for k in range(3)]
    assert [row["folder"] for row in table[3:]] == [""] * 3
    with pytest.raises(DivergedError, match=r"every variation has a network that diverged\. Type"):
        fit_members(image_folder, tmp_path / "none", stored, "seed=1", folds=3)


# folds


def test_no_network_sees_the_labels_of_its_fold(ensemble, tmp_path):
    rows = read_csv(ensemble.table)
    poisoned = [
        {**row, "label": f"class{(int(row['label'][-1]) + 1) % 3}"} if row["fold"] == "1" else row
        for row in rows
    ]
    shutil.copytree(ensemble.table.parent / "images", tmp_path / "data" / "images")
    table = write_table(tmp_path / "data" / "table.csv", poisoned)
    run = fit(table, out=tmp_path / "run", recipe=ensemble.recipe, store=ensemble.store, quiet=True)
    ours, theirs = artifacts(run), artifacts(ensemble.run)
    assert len(ours) == 4 * FOLDS
    for name, artifact in theirs.items():
        same = torch.equal(weights_of(ours[name]), weights_of(artifact))
        assert same == name.endswith("fold=1"), name
        assert (ours[name].task == artifact.task) == same, "shares of classes are of its own rows"


def test_every_held_out_sample_is_answered_by_those_that_did_not_train_on_it(ensemble):
    table, dataset = read_csv(ensemble.table), ensemble.dataset()
    members = [row for row in ensemble.members() if float(row["weight"])]
    assert len(members) == 2 * FOLDS
    images = [ensemble.table.parent / row["path"] for row in table]
    said = {row["folder"]: values_of(load(ensemble.folder / row["folder"]), images) for row in members}
    logs = np.zeros((len(table), 3))
    for row in members:
        weight = float(row["weight"])
        held = np.array([one["fold"] == row["fold"] for one in table])
        logs[held] += FOLDS * weight * np.log(said[row["folder"]][held])
        test = np.array([one["split"] == "test" for one in table])
        logs[test] += weight * np.log(said[row["folder"]][test])
    answers = np.exp(logs) / np.exp(logs).sum(1, keepdims=True)
    written = {row["path"]: row for row in read_csv(ensemble.folder / "predictions.csv")}
    for row, answer in zip(table, answers, strict=True):
        assert answer.sum() == pytest.approx(1, abs=1e-4)
        if row["split"] != "train":
            mine = [float(written[row["path"]][f"p_class{k}"]) for k in range(3)]
            assert mine == pytest.approx(answer.tolist(), abs=2e-4)
    held = np.array([row["split"] != "test" for row in table])
    task = Artifact.read(ensemble.folder / members[0]["folder"]).task
    expected = scores(task, answers[held] / answers[held].sum(1, keepdims=True), dataset.targets[held])
    found = ensemble.run.metrics["fleet"]["held_out"]
    assert found["num_samples"] == held.sum() == 48
    assert found["scores"] == pytest.approx(expected, abs=2e-3)


def test_folds_of_the_csv_keep_their_numbers_and_test_rows_have_none(ensemble, tmp_path):
    rows = [{**row, "fold": row["fold"] and 3 + 4 * int(row["fold"])} for row in read_csv(ensemble.table)]
    shutil.copytree(ensemble.table.parent / "images", tmp_path / "data" / "images")
    table = write_table(tmp_path / "data" / "table.csv", rows)
    run = fit_members(table, tmp_path / "run", ensemble.store, None, folds="column")
    members = read_csv(run.folder / "members.csv")
    assert [(row["member"], row["fold"]) for row in members] == [
        (f"losa fold={fold}", str(fold)) for fold in (3, 7, 11)
    ]
    assert run.row["method"] == "3-fold losa"
    assert run.metrics["fleet"]["folds"] == 3 and run.metrics["fleet"]["answering"] == 3


@pytest.mark.parametrize("asked", [3, "column"])
def test_a_table_with_folds_and_no_splits_is_tested_by_its_folds_alone(ensemble, tmp_path, capsys, asked):
    rows = read_csv(ensemble.table)
    for number, row in enumerate(rows):
        row.pop("split")
        row["fold"] = str(number // 2 % 3)
    shutil.copytree(ensemble.table.parent / "images", tmp_path / "data" / "images")
    table = write_table(tmp_path / "data" / "table.csv", rows)
    run = fit(table, out=tmp_path / "run", recipe=fleet_recipe(None, folds=asked), store=ensemble.store)
    assert (
        "folds are the data's own, and hold out every image; no test split is drawn"
        in capsys.readouterr().err
    )
    found = Artifact.read(run.folder / read_csv(run.folder / "members.csv")[0]["folder"]).recipe
    assert found.data.test_fraction == 0
    assert run.row["test"] is None
    assert run.metrics["fleet"]["held_out"]["num_samples"] == len(rows)
    answers = read_csv(run.folder / "predictions.csv")
    fold_of = {row["path"]: row["fold"] for row in rows}
    # validation is whole folds: what a probe is scored on has no neighbour in what it learnt from
    assert len({fold_of[row["path"]] for row in answers if row["split"] == "val"}) == 1
    again = fit(table, out=tmp_path / "run", recipe=fleet_recipe(None, folds=asked), store=ensemble.store)
    assert again.row == run.row
    with pytest.raises(DataError, match=r"is what the run was fitted on, and no split of it is test"):
        evaluate_run(run.folder, table)
    assert evaluate_run(run.folder, table, split="all").evaluation.num_samples == len(rows)


def test_a_run_without_test_images_says_what_can_be_scored(image_folder, tmp_path):
    recipe = toy_recipe("losa", "data.test_fraction=0")
    run = fit(image_folder, out=tmp_path / "run", recipe=recipe, store=tmp_path / "store", quiet=True)
    with pytest.raises(DataError, match=r"report scores its validation samples.* type: --split val"):
        evaluate_run(run.folder, image_folder)
    assert evaluate_run(run.folder, image_folder, split="val").evaluation.num_samples > 0


def test_a_faulty_column_of_folds_is_refused_wherever_its_row_is_drawn(ensemble, tmp_path):
    rows = read_csv(ensemble.table)
    for number, row in enumerate(rows):
        row.pop("split")
        row["fold"] = str(number // 2 % 3)
    shutil.copytree(ensemble.table.parent / "images", tmp_path / "data" / "images")
    for faulty in range(0, len(rows), 7):
        cells = [row | {"fold": "" if number == faulty else row["fold"]} for number, row in enumerate(rows)]
        table = write_table(tmp_path / "data" / "table.csv", cells)
        with pytest.raises(DataError, match=r"fold is empty for 1 of 60 rows"):
            fit(table, out=tmp_path / "run", recipe=fleet_recipe(None, folds="column"), store=ensemble.store)


def test_drawn_folds_say_that_a_column_is_there_and_leave_groups_whole(
    ensemble, tmp_path, monkeypatch, capsys
):
    rows = [{**row, "group": f"g{i // 2}"} for i, row in enumerate(read_csv(ensemble.table))]
    for row in rows:
        row.pop("split")
    shutil.copytree(ensemble.table.parent / "images", tmp_path / "data" / "images")
    table, seen = write_table(tmp_path / "data" / "table.csv", rows), {}

    def keep(job, recipe, *, name, rows, task):
        seen[name] = (job, rows)
        return real(job, recipe, name=name, rows=rows, task=task)

    real = sidetune.fleet_fit.new_member
    monkeypatch.setattr(sidetune.fleet_fit, "new_member", keep)
    recipe = fleet_recipe(None, folds=4)
    fit(table, out=tmp_path / "run", recipe=recipe, store=ensemble.store)
    assert "4 folds are drawn; the data's own column is used with: --folds column" in capsys.readouterr().err
    assert list(seen) == [f"losa fold={fold}" for fold in range(4)]
    held = []
    for job, own in seen.values():
        every = np.sort(np.concatenate([job.split["train"], job.split["val"]]))
        out = np.setdiff1d(every, own)
        held.append(out)
        assert not set(job.dataset.group[out]) & set(job.dataset.group[own])
        assert not set(own) & set(job.split["test"])
    assert np.array_equal(np.sort(np.concatenate(held)), every), "each sample is held out once"


@pytest.mark.parametrize("task", ["multilabel", "regress"])
def test_tables_of_several_outputs_in_folds(tmp_path, task):
    labels = {"multilabel": "coloured,right", "regress": "x,y"}[task]
    table = make_csv(tmp_path / "data", task, 40)
    settings = (f"data.task={task}", f"data.labels=[{labels}]", "train.lr=0.01")
    run = fit_members(table, tmp_path / "run", tmp_path / "s", "seed=0,1", *settings, folds=2, ensemble=True)
    members = read_csv(run.folder / "members.csv")
    second = {"multilabel": "mean_average_precision", "regress": "mae"}[task]
    assert all(row[second] and row[run.metrics["headline"]] for row in members)
    if task == "regress":
        stds = {artifact.task.std for artifact in artifacts(run).values()}
        assert len(stds) == 2, "each fold scales targets by its own rows"
    found = evaluate_run(run.folder, table)
    assert found.evaluation.scores == pytest.approx(run.row["test"]["scores"], abs=1e-3)
    assert run.metrics["fleet"]["held_out"]["num_samples"] == 32


@pytest.mark.parametrize(
    ("fleet", "error", "message"),
    [
        ({"folds": 1000}, DataError, "48 samples of train and val for 1000 folds.* --folds 48"),
        ({"folds": "column"}, DataError, "has no column 'fold'"),
        ({"members": "pool=tokens"}, SideError, "side.pool is 'tokens'"),
        ({"members": "side=losa,ridge"}, RecipeError, "solved, not trained"),
    ],
)
def test_what_cannot_be_is_refused_before_an_image_is_read(
    image_folder, tmp_path, monkeypatch, fleet, error, message
):
    monkeypatch.setattr(OPENING, "extract", lambda *_, **__: pytest.fail("images were read"))
    with pytest.raises(error, match=message):
        fit_members(image_folder, tmp_path / "run", tmp_path / "s", **{"members": None, **fleet})
    assert not (tmp_path / "run").exists()


# the run folder


def test_a_finished_fleet_is_found_and_nothing_is_computed_or_written(ensemble, monkeypatch):
    before = snapshot(ensemble.folder)
    for name in ("open_jobs", "locked", "fit_methods"):
        monkeypatch.setattr(MODULE, name, lambda *_, **__: pytest.fail("it was computed again"))
    again = fit(ensemble.table, out=ensemble.folder, recipe=ensemble.recipe, store=ensemble.store, quiet=True)
    assert again == ensemble.run == Run.open(ensemble.folder)
    assert snapshot(ensemble.folder) == before


def test_another_fleet_in_the_folder_of_a_run_is_refused(ensemble):
    other = fleet_recipe("side=losa,last;seed=0,2", *SETTINGS, folds="column", ensemble=True)
    with pytest.raises(ArtifactError, match=r"holds another run: fleet.members is .*seed=0,1.* there and"):
        fit(ensemble.table, out=ensemble.folder, recipe=other, store=ensemble.store)


def test_members_of_a_run_that_was_killed_at_its_end_do_not_stay(image_folder, stored, tmp_path):
    left = tmp_path / "run" / "members" / "0123456789abcdef"
    left.mkdir(parents=True)
    (left / "side.safetensors").write_bytes(b"of another recipe")
    (tmp_path / "run" / "recipe.json").write_text("{}")
    run = fit_members(image_folder, tmp_path / "run", stored, "seed=0,1")
    folders = {row["folder"] for row in read_csv(run.folder / "members.csv")}
    assert {f"members/{path.name}" for path in (run.folder / "members").iterdir()} == folders


@pytest.mark.parametrize(("fleet", "twins"), [({}, set()), ({"folds": 2}, {("18", "12")})])
def test_twins_of_test_images_in_validation_count_where_that_is_trained_on(tmp_path, fleet, twins):
    table = column_runs.write_table(tmp_path / "data", sparse=False)
    images = table.parent / "images"
    shutil.copy(images / "12.png", images / "18.png")  # of validation, and of test
    asked = column_runs.recipe("train.epochs=1", labels=("colour",), fleet=fleet)
    run = fit(table, out=tmp_path / "run", recipe=asked, store=tmp_path / "store", quiet=True)
    leaks = json.loads((run.folder / "findings.json").read_text())["leaks"]
    found = {(pair["path"][-6:-4], pair["train_path"][-6:-4]) for pair in leaks["pairs"] if pair["identical"]}
    assert found == twins
    assert leaks["compared"] == {"train": 30 if fleet else 24, "others": 12}


def test_a_quiet_fleet_says_nothing(image_folder, stored, tmp_path, capsys):
    fit_members(image_folder, tmp_path / "run", stored, "lr=0.01,1e30", ensemble=True)
    assert capsys.readouterr().err == ""


def test_a_fleet_of_one_is_the_run_alone(image_folder, stored, tmp_path):
    run = fit_members(image_folder, tmp_path / "fleet", stored, "lr=0.01", ensemble=True)
    solo = fit(
        image_folder,
        out=tmp_path / "solo",
        recipe=toy_recipe("losa", "train.lr=0.01", "features.dtype=fp32"),
        store=stored,
        quiet=True,
    )
    assert torch.equal(weights_of(run.artifact()), weights_of(solo.artifact()))
    assert (run.folder / "predictions.csv").read_text() == (solo.folder / "predictions.csv").read_text()

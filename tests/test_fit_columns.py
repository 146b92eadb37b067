"""Several label columns of one table: a run each, of one pass over the features."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sidetune.optimizer
import sidetune.outcome
import sidetune.side_fit
import sidetune.train
from column_runs import NAMES, Columns, recipe
from fitted_runs import read_csv
from sidetune import ColumnsRun, Recipe, Run, fit, fit_columns
from sidetune.backbones.hooked import HookedBackbone
from sidetune.columns import column_folders, folder_names
from sidetune.errors import ArtifactError, DataError, DivergedError, RequestError

FIT = importlib.import_module("sidetune.fit")  # `sidetune.fit` is the function


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Columns:
    return Columns(tmp_path_factory.mktemp("columns"))


@pytest.fixture(scope="module")
def run(columns: Columns) -> ColumnsRun:
    return columns.fit("run", columns.table, recipe())


@pytest.fixture(scope="module")
def sparse(columns: Columns) -> ColumnsRun:
    return columns.fit("sparse-run", columns.sparse, recipe())


def recipe_of(run: Run) -> Recipe:
    return Recipe.model_validate(json.loads((run.folder / "recipe.json").read_text())["recipe"])


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.artifact().model.state_dict()


def test_each_column_is_a_whole_run(run: ColumnsRun) -> None:
    assert list(run.runs) == list(NAMES)
    assert {name: path.name for name, path in column_folders(run.folder).items()} == {
        "colour": "colour",
        "a/b side": "a_b_side",
    }
    for name, own in run.runs.items():
        assert {path.name for path in own.folder.glob("[!.]*")} == {
            *("recipe.json", "metrics.json", "history.jsonl", "predictions.csv", "findings.json"),
            *("side.safetensors", "artifact.json", "report.html", "skipped.csv"),
        }
        assert (recipe_of(own).data.labels, recipe_of(own).data.split_by) == ((name,), None)
        assert [row["method"] for row in own.metrics["rows"]] == ["ridge-last", "ridge", "linear", "losa"]
    assert run.runs["a/b side"].metrics["outputs"] == ["left", "right"]
    page = (run.folder / "report.html").read_text()
    assert 'href="a_b_side/report.html">a/b side<' in page and "balanced accuracy" in page.lower()


def test_a_column_ends_where_it_would_have_ended_alone(columns: Columns, run: ColumnsRun) -> None:
    """With every cell filled nothing differs but the width of a matrix product."""
    for number, own in enumerate(run.runs.values()):
        alone = columns.alone(f"alone-{number}", columns.table, recipe_of(own))
        assert alone.recipe_hash == own.recipe_hash
        for name, tensor in weights(alone).items():
            torch.testing.assert_close(weights(own)[name], tensor, rtol=2e-4, atol=2e-5, msg=name)
        mine, theirs = (read_csv(one.folder / "predictions.csv") for one in (own, alone))
        for left, right in zip(mine, theirs, strict=True):
            assert (left["path"], left["split"], left["label"]) == (
                right["path"],
                right["split"],
                right["label"],
            )
            for key in left.keys() - {"path", "split", "label", "predicted"}:
                assert float(left[key]) == pytest.approx(float(right[key]), abs=1e-4)


def test_a_column_of_which_all_members_diverged_is_named(columns: Columns, monkeypatch) -> None:
    def train(*arguments, **more):
        trained = real(*arguments, **more)
        return {
            name: replace(one, model=None) if name.startswith("a_b_side ") else one
            for name, one in trained.items()
        }

    real = sidetune.side_fit.train
    monkeypatch.setattr(sidetune.side_fit, "train", train)
    asked = recipe("train.epochs=1", fleet={"members": "seed=0,1"})
    with pytest.raises(DivergedError, match=r"column 'a/b side': every variation has a network that div"):
        columns.fit("one-diverged", columns.table, asked)


def test_rows_without_a_class_take_no_part_in_their_column(sparse: ColumnsRun) -> None:
    colour, side = (one.metrics["data"] for one in sparse.runs.values())
    assert [colour[f"num_{name}"] for name in ("train", "val", "test")] == [24, 6, 6]
    assert sum(side[f"num_{name}"] for name in ("train", "val", "test")) == 29
    predicted = read_csv(sparse.runs["a/b side"].folder / "predictions.csv")
    assert {row["label"] for row in predicted} == {"left", "right"}
    assert len(predicted) == side["num_val"] + side["num_test"]


def test_the_recipe_of_a_column_gives_its_rows_again(columns: Columns) -> None:
    """Splits were drawn by the first column; the other's recipe says so, and has empty cells as well."""
    together = columns.fit("drawn-run", columns.drawn, recipe())
    own = together.runs["a/b side"]
    assert recipe_of(own).data.split_by == "colour"
    alone = columns.alone("drawn-alone", columns.drawn, recipe_of(own))
    paths = [[row["path"] for row in read_csv(one.folder / "predictions.csv")] for one in (own, alone)]
    assert paths[0] == paths[1]
    # ridge is solved on the same rows: to the bit
    assert own.metrics["rows"][1]["val"] == alone.metrics["rows"][1]["val"]


@pytest.mark.parametrize("side", ["last", "ridge"])
def test_other_sides(columns: Columns, side: str) -> None:
    found = columns.fit(f"side-{side}", columns.sparse, recipe(side={"name": side}))
    assert {one.row["method"] for one in found.runs.values()} == {side}


def test_members_and_folds_are_chosen_for_each_column(columns: Columns) -> None:
    asked = recipe(fleet={"members": "lr=1e-3,1e-2", "folds": 2, "ensemble": True})
    found = columns.fit("fleet", columns.drawn, asked)
    tables = {name: read_csv(own.folder / "members.csv") for name, own in found.runs.items()}
    for name, lines in tables.items():
        assert sorted((one["member"], one["fold"]) for one in lines) == [
            (f"lr={lr} fold={fold}", str(fold)) for lr in ("1e-2", "1e-3") for fold in (0, 1)
        ]
        folders = {one["folder"] for one in lines}
        assert len(folders) == 4
        assert all((found.runs[name].folder / folder / "artifact.json").exists() for folder in folders)
    again = columns.fit("fleet", columns.drawn, asked)
    assert again == found


def test_the_same_command_prints_the_result_and_another_is_refused(
    columns: Columns, run: ColumnsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FIT, "open_jobs", lambda *_, **__: pytest.fail("it computes"))
    assert columns.fit("run", columns.table, recipe()) == run
    assert columns.alone("run/colour", columns.table, recipe_of(run.runs["colour"])) == run.runs["colour"]
    with pytest.raises(
        ArtifactError, match=r'holds another run: data.labels is \["colour", "a/b side"\] there'
    ):
        columns.fit("run", columns.table, recipe(labels=("a/b side", "colour")))
    with pytest.raises(ArtifactError, match=r"holds another run: data.labels is"):
        columns.alone("run", columns.table, recipe(labels=("colour",)))
    with pytest.raises(ArtifactError, match="its data are others"):
        columns.fit("run", columns.sparse, recipe())
    with pytest.raises(ArtifactError, match="holds a run a label column, in folders of their own"):
        Run.open(run.folder)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["step", "first column", "second column", "links"])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    columns: Columns, sparse: ColumnsRun, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def die(owner: object, name: str, after: int) -> None:
        original, calls = getattr(owner, name), []

        def dying(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) > after:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, dying)

    monkeypatch.setattr(sidetune.train, "CHECKPOINT_SECONDS", 0.0)
    where = {
        "step": (sidetune.optimizer.MemberAdamW, "step", 7),
        "first column": (sidetune.outcome, "write_run", 0),
        "second column": (sidetune.outcome, "write_run", 1),
        "links": (FIT, "write_columns", 0),
    }
    die(*where[at])
    name = f"killed-{at}"
    with pytest.raises(Killed):
        columns.fit(name, columns.sparse, recipe())
    folder = columns.root / name
    assert (folder / "checkpoint.safetensors").exists()
    with pytest.raises(ArtifactError, match="is not a finished run"):
        ColumnsRun.open(folder)
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match=r"holds another run: train.lr"):
        columns.fit(name, columns.sparse, recipe("train.lr=1e-4"))
    again = columns.fit(name, columns.sparse, recipe())
    for column, own in again.runs.items():
        for file in ("side.safetensors", "artifact.json", "predictions.csv", "recipe.json"):
            expected = (sparse.runs[column].folder / file).read_bytes()
            assert (own.folder / file).read_bytes() == expected, (column, file)
    assert not (folder / "checkpoint.safetensors").exists()


def test_what_a_killed_one_has_finished_is_not_lost_to_another_request(
    columns: Columns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where it was so quick that there is no checkpoint."""

    def die(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(FIT, "write_columns", die)
    with pytest.raises(Killed):
        columns.fit("quick", columns.table, recipe())
    monkeypatch.undo()
    assert not (columns.root / "quick" / "checkpoint.safetensors").exists()
    with pytest.raises(ArtifactError, match="holds another run"):
        columns.fit("quick", columns.table, recipe("train.lr=1e-4"))


def test_live_the_backbone_serves_all_columns(columns: Columns, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = HookedBackbone.__call__

    def counted(self: HookedBackbone, images: torch.Tensor) -> object:
        calls.append(len(images))
        return original(self, images)

    monkeypatch.setattr(HookedBackbone, "__call__", counted)
    seen = {}
    for labels in (NAMES, ("colour",)):
        calls.clear()
        asked = recipe(labels=labels, features={"mode": "live"})
        out = columns.root / f"live-{len(labels)}"
        (fit_columns if len(labels) > 1 else fit)(columns.table, out=out, recipe=asked, quiet=True)
        seen[len(labels)] = sum(calls)
    # one pass an epoch for both; then a side is scored on its own, and shows where it looked
    assert seen[2] <= seen[1] + 12 + 18 < 1.5 * seen[1]


@pytest.mark.parametrize(
    ("labels", "header", "cells", "error", "text"),
    [
        (("colour", "colour"), "colour", "rg", DataError, "expected different columns"),
        (("colour", "split"), "colour", "rg", DataError, "none of them path, split, group, fold"),
        (("colour", "shape"), "colour", "rg", DataError, "has no column 'shape'"),
        (("colour", "one"), "colour,one", "rg,x", DataError, "column 'one' has one class in train, 'x'"),
        (("colour", "none"), "colour,none", "rg,-", DataError, "column 'none' has no class in train"),
    ],
)
def test_errors(
    tmp_path: Path, labels: tuple[str, ...], header: str, cells: str, error: type[Exception], text: str
) -> None:
    rows = []
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(b"x")
        rows.append(",".join([f"{i}.png", *(c[i % len(c)].strip("-") for c in cells.split(","))]))
    (tmp_path / "table.csv").write_text("\n".join([f"path,{header}", *rows]))
    with pytest.raises(error, match=text):
        fit_columns(tmp_path / "table.csv", out=tmp_path / "run", recipe=recipe(labels=labels), quiet=True)
    assert not (tmp_path / "run").exists()


def test_fit_and_fit_columns_name_each_other(columns: Columns, tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match=r"got 2 class columns, .*: a run each. Type.*sidetune.fit_columns"
    ):
        fit(columns.table, out=tmp_path / "run", recipe=recipe())
    with pytest.raises(
        RequestError, match=r"expected classify with two columns or more. Type.*sidetune.fit\("
    ):
        fit_columns(columns.table, out=tmp_path / "run", recipe=recipe(labels=("colour",)))


def test_folders_of_columns_are_safe_and_no_two_are_alike() -> None:
    names = ["a/b", "a b", "..", "members", "Colour", "colour", "größe", "列", "x" * 300, "", "report.html"]
    names.append("artifact.json")
    found = folder_names(names)
    assert found[:7] == ["a_b", "a_b-2", "column", "members-2", "Colour", "colour-2", "größe"]
    assert (
        found[7] == "列"
        and len(found[8]) == 80
        and found[9:] == ["column-2", "report.html-2", "artifact.json-2"]
    )
    assert len({name.casefold() for name in found}) == len(names)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda index: index["columns"].clear(), "columns is .* at least 1"),
        (lambda index: index["columns"][0].update(folder="../run/colour/.."), "is elsewhere"),
        (lambda index: index["columns"][0].update(folder="nowhere"), "artifact.json is missing"),
        (lambda index: index["columns"][0].update(name="a/b side"), "a column stands there twice"),
        (lambda index: index.update(format=2), "format is 2"),
    ],
)
def test_a_damaged_index_is_refused(run: ColumnsRun, tmp_path: Path, change: object, text: str) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    index = json.loads((tmp_path / "run" / "columns.json").read_text())
    change(index)
    (tmp_path / "run" / "columns.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=text):
        ColumnsRun.open(tmp_path / "run")

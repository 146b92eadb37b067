"""Runs of several label columns answer in one pass over the images, each as it would alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sidetune
from column_runs import NAMES, Columns, recipe
from images import draw_shape
from sidetune import ColumnsRun, load, load_columns_run
from sidetune.backbones.hooked import HookedBackbone
from sidetune.cli import main
from sidetune.errors import ArtifactError, DataError, RequestError
from sidetune.rescore import evaluate_columns, evaluate_run


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Columns:
    return Columns(tmp_path_factory.mktemp("columns"))


@pytest.fixture(scope="module")
def run(columns: Columns) -> ColumnsRun:
    return columns.fit("drawn-run", columns.drawn, recipe())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that the backbone has seen."""
    seen: list[int] = []
    original = HookedBackbone.__call__

    def counted(self: HookedBackbone, images: torch.Tensor) -> object:
        seen.append(len(images))
        return original(self, images)

    monkeypatch.setattr(HookedBackbone, "__call__", counted)
    return seen


def files(columns: Columns) -> list[Path]:
    return sorted((columns.drawn.parent / "images").iterdir())[:5]


def test_all_columns_answer_in_one_pass_as_each_alone(
    columns: Columns, run: ColumnsRun, passes: list[int], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    images = [*files(columns), tmp_path / "bad.png"]
    predictor = load_columns_run(run.folder)
    passes.clear()
    found = predictor.predict(images, abstain_below=0.6)
    assert sum(passes) == len(images)
    for name, own in run.runs.items():
        assert found[name] == load(own.folder).predict(images, abstain_below=0.6)
    assert [item.error is None for item in found["colour"]] == [True] * 5 + [False]


def test_eval_scores_each_column_on_the_rows_that_have_a_class(
    columns: Columns, run: ColumnsRun, passes: list[int]
) -> None:
    found = evaluate_columns(run.folder, columns.drawn)
    assert list(found) == list(NAMES)
    for name, own in run.runs.items():
        assert found[name].split == "test", "the run's own data are known again"
        alone = evaluate_run(own.folder, columns.drawn)
        assert found[name].evaluation.scores == pytest.approx(alone.evaluation.scores, abs=1e-5)
        assert found[name].evaluation.num_samples == own.metrics["data"]["num_test"]
        expected = own.row["test"]["scores"]
        assert found[name].evaluation.scores == pytest.approx(expected, rel=1e-3, abs=1e-3)
    passes.clear()
    every = evaluate_columns(run.folder, columns.drawn, split="all")
    assert [one.evaluation.num_samples for one in every.values()] == [36, 29]
    assert sum(passes) <= 36 + 2 * len(NAMES), "one pass, and the check values of each column"
    only = evaluate_columns(run.folder, columns.drawn, split="all", labels=["a/b side"])
    assert list(only) == ["a/b side"]
    assert only["a/b side"].evaluation.scores == pytest.approx(every["a/b side"].evaluation.scores, abs=1e-5)


def test_images_that_cannot_be_read_are_named_for_their_columns(run: ColumnsRun, tmp_path: Path) -> None:
    rows = ["path,colour,a/b side"]
    for i in range(6):
        picture = draw_shape(i % 3, 3, np.random.default_rng(i), size=32, centre=(0.3, 0.5))
        picture.save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{('red', 'green', 'blue')[i % 3]},{'' if i == 4 else ('left', 'right')[i % 2]}")
    for i in (3, 4):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    found = evaluate_columns(run.folder, tmp_path / "t.csv", split="all")
    assert {name: sorted(one.skipped) for name, one in found.items()} == {
        "colour": ["3.png", "4.png"],
        "a/b side": ["3.png"],
    }
    assert [one.evaluation.num_samples for one in found.values()] == [4, 4]


def test_errors(columns: Columns, run: ColumnsRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the run has no column 'color'. Did you mean 'colour'"):
        evaluate_columns(run.folder, columns.drawn, labels=["color"])
    with pytest.raises(DataError, match="no split named 'tset'"):
        evaluate_columns(run.folder, columns.drawn, split="tset")
    with pytest.raises(ArtifactError, match="is not a finished run"):
        load_columns_run(tmp_path)
    with pytest.raises(ArtifactError, match="holds a run a label column"):
        load(run.folder)
    with pytest.raises(RequestError, match="got --abstain-below 2"):
        load_columns_run(run.folder).predict(files(columns), abstain_below=2)


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["sidetune", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)


def test_the_command_line(
    columns: Columns,
    run: ColumnsRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = files(columns)[0]
    command(monkeypatch, "predict", run.folder, image)
    path, *cells = capsys.readouterr().out.strip().split("\t")
    assert path == str(image)
    assert [cell.rsplit(" ", 2)[0] for cell in cells] == list(NAMES)
    assert [cell.rsplit(" ", 2)[1] for cell in cells] == [
        own[0].label for own in load_columns_run(run.folder).predict([image]).values()
    ]
    command(monkeypatch, "predict", run.folder, image, "--abstain-below", "1")
    assert capsys.readouterr().out.strip().endswith("a/b side withheld")
    command(monkeypatch, "predict", run.folder, image, "--json")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["columns"]["colour"][0]["values"].keys() == {"red", "green", "blue"}

    command(monkeypatch, "eval", run.folder, columns.drawn)
    said = capsys.readouterr().out
    assert "colour: 7 images of test" in said and "a/b side: " in said
    command(monkeypatch, "eval", run.folder, columns.drawn, "--json")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["columns"]["colour"]["split"] == "test"

    options = ("--backbone", "toy", "--out", run.folder, "--store", columns.root / "stores" / "drawn")
    settings = ("--set", "train.epochs=3", "--set", "train.batch_size=8", "--set", "train.lr=1e-2")
    fit = ("fit", columns.drawn, "--labels", ",".join(NAMES), *options, *settings, "--quiet")
    command(monkeypatch, *fit)  # it is finished: its result is printed
    said = capsys.readouterr().out
    assert "colour: Balanced accuracy" in said and "a/b side: Balanced accuracy" in said
    assert said.rstrip().endswith("report.html")
    command(monkeypatch, *fit, "--json")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["run"] == str(run.folder)
    assert {name: one["outputs"] for name, one in found["columns"].items()} == {
        "colour": ["blue", "green", "red"],
        "a/b side": ["left", "right"],
    }
    assert isinstance(sidetune.ColumnsRun.open(run.folder), ColumnsRun)

import csv
import io
import json
import subprocess
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from sidetune import demo
from sidetune.errors import BackboneError, MissingExtraError, SidetuneError


def package_is_missing(name):
    try:
        distribution(name)
    except PackageNotFoundError:
        return True
    return False


needs_photographs = pytest.mark.skipif(
    package_is_missing("elpv-dataset"), reason="the package elpv-dataset is not installed"
)


@pytest.fixture(scope="module")
def rows():
    return list(csv.DictReader(io.StringIO(demo.elpv_table())))


@needs_photographs
def test_the_splits_have_their_sizes_and_both_classes(rows):
    assert Counter(row["split"] for row in rows) == {"train": 1000, "val": 512, "test": 1024}
    by_class = Counter((row["split"], row["label"]) for row in rows)
    assert {label for _, label in by_class} == {"functional", "defective"}
    assert all(by_class[split, "defective"] > 100 for split in ("train", "val", "test"))


@needs_photographs
def test_no_block_of_neighbouring_cells_straddles_splits(rows):
    splits = {}
    for row in rows:
        number = int(Path(row["path"]).stem.removeprefix("cell")) - 1
        assert row["group"] == f"block {number // 64}"
        assert row["split"] == ["train", "train", "val", "test", "test"][number // 64 % 5]
        splits.setdefault(row["group"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert len(splits) == 41


@needs_photographs
def test_every_photograph_is_there_once(rows):
    paths = [row["path"] for row in rows]
    assert len(set(paths)) == len(paths)
    assert all(Path(path).is_file() for path in paths)


@needs_photographs
def test_a_likelihood_above_one_half_is_defective(rows):
    labels = Path(str(distribution("elpv-dataset").locate_file("elpv_dataset/data/labels.csv")))
    likelihood = {line.split()[0]: float(line.split()[1]) for line in labels.read_text().splitlines() if line}
    for row in rows:
        name = "images/" + Path(row["path"]).name
        assert (row["label"] == "defective") == (likelihood[name] > 0.5)


def test_without_the_photographs_the_command_that_brings_them_is_said(monkeypatch, tmp_path):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(demo, "distribution", absent)
    with pytest.raises(MissingExtraError) as error:
        demo.run_demo(tmp_path)
    assert str(error.value) == "elpv-dataset is not installed. Type: pip install 'sidetune[demo]'"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """The demo with a table of nothing, and commands that only write what the next stage reads."""
    ran = []

    def command(words, **_):
        arguments = words[3:]
        ran.append(arguments)
        if arguments[0] == "fit":
            out, side = (Path(arguments[arguments.index(name) + 1]) for name in ("--out", "--side"))
            out.mkdir(parents=True)
            scores = {"accuracy": 0.9, "balanced_accuracy": 0.85, "auroc": 0.95, "log_loss": 0.3}
            pairs = {name: [0.8, 1.0] for name in scores}
            split = {"scores": scores, "intervals": pairs}
            row = {"method": str(side), "parameters": 12_345, "seconds": 61.0, "peak_memory_bytes": 2**30}
            row |= {"val": split, "test": split}
            cost = {"seconds": {"features": 9.0}}
            (out / "metrics.json").write_text(json.dumps({"side": str(side), "rows": [row], "cost": cost}))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(demo, "elpv_table", lambda: "path,label\n")
    monkeypatch.setattr(demo, "build_backbone", lambda _: None)
    monkeypatch.setattr(demo.subprocess, "run", command)
    monkeypatch.setenv("COLUMNS", "80")
    return ran


def test_features_once_then_four_sides_each_in_its_own_process(stages, tmp_path, capsys):
    summary = demo.run_demo(tmp_path)
    assert [words[0] for words in stages] == ["extract", "fit", "fit", "fit", "fit"]
    store = str(tmp_path / "store")
    assert stages[0][-1] == store
    for words, side in zip(stages[1:], ("ridge", "linear", "losa", "last"), strict=True):
        assert words[words.index("--side") + 1] == side
        assert words[words.index("--store") + 1] == store
        assert words[words.index("--size") + 1] == "224"
        assert "train.epochs=8" in words
        assert "train.seed=0" in words
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    row = summary["rows"][2]
    assert (row["side"], row["seed"], row["parameters"]) == ("losa", 0, 12_345)
    assert (row["val_balanced_accuracy"], row["test_accuracy"], row["test_auroc"]) == (0.85, 0.9, 0.95)
    assert row["test_balanced_accuracy_interval"] == [0.8, 1.0]
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-4])) <= 80
    assert "…" not in out
    assert out.count("80.0..100.0  80.0..100.0  80.0..100.0") == 4
    assert [line for line in out.splitlines() if "report.html" in line] == [
        str(tmp_path / side / "report.html") for side in ("ridge", "linear", "losa", "last")
    ]


def test_a_stage_that_fails_is_named(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 1))
    with pytest.raises(SidetuneError) as error:
        demo.run_demo(tmp_path)
    assert str(error.value) == (
        "sidetune extract ended with 1, expected 0: its own message stands above. Type: sidetune demo, which "
        "resumes, or sidetune demo --out NEW"
    )


def test_missing_weights_are_said_before_anything_is_decoded(stages, tmp_path, monkeypatch):
    def refuse(name):
        raise BackboneError("no weights")

    monkeypatch.setattr(demo, "build_backbone", refuse)
    with pytest.raises(BackboneError, match="no weights"):
        demo.run_demo(tmp_path)
    assert stages == []

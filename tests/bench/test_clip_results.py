import json
import runpy
import sys
from pathlib import Path

import pytest

from clips import make_clips

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    found = runpy.run_path(str(SCRIPTS / "clip_results.py"))
    given = found["main"].__globals__
    given["git"] = lambda *words: "" if words[0] == "status" else "c" * 40
    return given


def test_each_method_has_a_line_a_seed_and_each_gain_an_interval(script, tmp_path, monkeypatch):
    root = make_clips(tmp_path / "clips")
    files = sorted(path for path in root.glob("*/*"))
    table = tmp_path / "clips.csv"
    rows = [f"{file},{file.parent.name},{number % 3}" for number, file in enumerate(files)]
    table.write_text("\n".join(["path,label,fold", *rows]) + "\n")
    words = ["--backbone", "toy", "--size", "32", "--frames", "2", "--epochs", "2", "--seeds", "2"]
    words += ["--sides", "losa", "--out", str(tmp_path / "runs"), "--into", str(tmp_path / "lines.jsonl")]
    monkeypatch.setattr(sys, "argv", ["clip_results.py", str(table), *words])
    script["main"]()
    first = (tmp_path / "lines.jsonl").read_text()
    found = [json.loads(line) for line in first.splitlines()]
    names = [(line["method"], line["seed"]) for line in found]
    shuffled = "losa, frames shuffled"
    assert names == [
        *[("ridge", None), ("losa", 0), ("losa", 1), (shuffled, 0), (shuffled, 1)],
        *[("losa - ridge", "0 to 1"), (f"losa - {shuffled}", "0 to 1")],
    ]
    assert all(len(line["recipe"]) == 64 and line["metric"] == "out_of_fold_accuracy" for line in found)
    low, high = found[-1]["interval"]
    assert low <= found[-1]["value"] <= high
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.npy")}
    assert len(kept) == 2
    script["main"]()
    assert (tmp_path / "lines.jsonl").read_text() == first
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "nothing is trained again"


def test_frames_of_every_sampling_are_in_another_order(script):
    reading = script["Reading"].of_clips(8, 16, drawn=32)
    shuffled = script["with_shuffled_frames"](reading)
    assert [sorted(view) for view in shuffled.views] == [sorted(view) for view in reading.views]
    assert all(list(view) != sorted(view) for view in shuffled.views)
    assert shuffled.stored == reading.stored and shuffled.scored == reading.scored

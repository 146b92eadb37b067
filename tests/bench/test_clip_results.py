import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from clips import make_clips
from sidetune.backbones import build_backbone
from sidetune.data import load_dataset
from sidetune.data.reading import Reading
from sidetune.extract import extract, sample_keys
from sidetune.sources import StoredSource

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
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.npz")}
    assert len(kept) == 2
    script["main"]()
    assert (tmp_path / "lines.jsonl").read_text() == first
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "nothing is trained again"


def test_frames_of_each_clip_and_sampling_are_in_an_order_of_their_own(script, tmp_path):
    dataset, reading = (
        load_dataset(make_clips(tmp_path / "clips"), clips=True),
        Reading.of_clips(4, 8, drawn=5),
    )
    keys = sample_keys(dataset)
    store = extract(dataset, build_backbone("toy"), tmp_path / "s", views=reading.stored, quiet=True)
    plain, shuffled = (
        kind(store, keys, reading=reading) for kind in (StoredSource, script["ShuffledFrames"])
    )
    rows, views = [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]
    found = [
        source.features(rows, views=views)["block.4"].unflatten(1, (4, -1)) for source in (plain, shuffled)
    ]
    for before, after in zip(*found, strict=True):
        orders = [[torch.equal(one, other) for other in before] for one in after]
        assert [sum(row) for row in orders] == [1] * 4, "each frame is one of those that were there"
    assert not torch.equal(*found)
    again = shuffled.features(rows, views=views)["block.4"].unflatten(1, (4, -1))
    assert torch.equal(again, found[1])

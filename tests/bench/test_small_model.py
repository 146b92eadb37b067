import json
import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch

from clips import make_clips
from images import make_folder

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHARED = [
    "--backbone",
    "toy",
    "--size",
    "32",
    "--weights",
    "random",
    "--minutes",
    "0.001,2",
    "--seeds",
    "2",
]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    given = runpy.run_path(str(SCRIPTS / "small_model.py"))["main"].__globals__
    given["solo_epoch_seconds"] = lambda *_: 30.0  # what it is measured to be
    given["git"] = lambda *words: "" if words[0] == "status" else "c" * 40
    return given


def lines_of(script, monkeypatch, tmp_path, *words):
    into = tmp_path / "lines.jsonl"
    given = [*map(str, words), *SHARED, "--out", str(tmp_path / "runs"), "--into", str(into)]
    monkeypatch.setattr(sys, "argv", ["small_model.py", *given])
    script["main"]()
    return [json.loads(line) for line in into.read_text().splitlines()]


def check(lines, chosen=2.0):
    for line in lines:
        for epochs, of_one in zip(line["epochs"], line["epoch_seconds"], strict=True):
            seconds = line["before_seconds"] + epochs * of_one
            assert 60 * line["minutes"] - of_one < seconds <= 60 * line["minutes"] and epochs >= 1
        assert len(line["took_seconds"]) == len(line["epochs"]) and min(line["took_seconds"]) > 0
        assert line["lr_chosen_at_minutes"] == chosen and 0 <= line["value"] <= 1
        assert len(line["recipe"]) == 64 and line["metric"] == "accuracy" and line["peak_bytes"] > 10**7
    alone = [line for line in lines if not line["ridge"]]
    assert {line["method"] for line in alone} == {"DINOv2-S, LoSA", "EfficientNet-Lite0, full"}
    assert {line["seed"] for line in lines} == {0, 1}


def test_both_train_for_the_epochs_that_fit(script, tmp_path, monkeypatch):
    lines = lines_of(script, monkeypatch, tmp_path, make_folder(tmp_path / "data", 2, 40))
    check(lines)
    assert [line["minutes"] for line in lines] == [2.0] * 6, (
        "a line a contender and seed, where an epoch fits, and another of LoSA with ridge's share"
    )
    with_ridge = [line for line in lines if line["method"] == "DINOv2-S, LoSA, with ridge's share"]
    assert [line["seed"] for line in with_ridge] == [0, 1]


def test_clips_answer_for_the_fold_that_they_did_not_see(script, tmp_path, monkeypatch):
    root = make_clips(tmp_path / "clips")
    files = sorted(root.glob("*/*"))
    rows = [f"{file},{file.parent.name},{number % 3}" for number, file in enumerate(files)]
    table = tmp_path / "clips.csv"
    table.write_text("\n".join(["path,label,fold", *rows]) + "\n")
    found = lines_of(script, monkeypatch, tmp_path, table, "--frames", "2", "--lr", "losa=1e-3,full=1e-4")
    check(found, chosen=None)
    assert {line["method"]: line["lr"] for line in found} == {
        "DINOv2-S, LoSA": 1e-3,
        "EfficientNet-Lite0, full": 1e-4,
    }
    assert "--frames 2 --lr losa=0.001,full=0.0001 " in found[0]["command"]


def test_clips_without_rates_and_images_with_them_are_refused(script, tmp_path, monkeypatch):
    for words in (["--frames", "2"], ["--lr", "losa=1e-3,full=1e-4"]):
        with pytest.raises(SystemExit, match="clips in folds need rates, images choose"):
            lines_of(script, monkeypatch, tmp_path, tmp_path, *words)


@pytest.mark.parametrize("rates", ["losa=1e-3", "1e-3", "losa=1e-3,full=3e-4,lora=1e-3"])
def test_a_rate_too_few_or_too_many_names_what_to_type(script, tmp_path, monkeypatch, capsys, rates):
    with pytest.raises(SystemExit):
        lines_of(script, monkeypatch, tmp_path, tmp_path, "--lr", rates)
    assert f"got {rates}, expected both rates. Type: --lr losa=1e-3,full=3e-4" in capsys.readouterr().err


def test_full_fine_tuning_begins_at_the_model_itself(script):
    model = script["SmallModel"](32, "random")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.stages().embed(images)
    torch.testing.assert_close(tokens, model(images)["block.1"])
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_weights_under_other_names_are_taken_in_their_order(script):
    theirs = timm.create_model("tf_efficientnet_lite0")
    weights = {f"_{name}": tensor for name, tensor in theirs.state_dict().items()}
    weights = {name.replace("_classifier", "_fc"): tensor for name, tensor in weights.items()}
    ours = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    load_in_order = import_module("efficientnet").load_in_order
    load_in_order(ours, weights)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    with pytest.raises(AssertionError):
        load_in_order(ours, dict(list(weights.items())[::-1]))

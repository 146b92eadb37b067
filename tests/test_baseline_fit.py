"""Baselines in the one loop: stored equals live, twice the same, resumed the same; `fit` refuses them."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fitted_runs import toy_recipe
from sidetune import fit
from sidetune.backbones import build_backbone
from sidetune.backbones.base import weights_digest
from sidetune.backbones.toy import ToyBackbone
from sidetune.bucket import Bucket
from sidetune.data import load_dataset
from sidetune.errors import RequestError
from sidetune.extract import sample_keys
from sidetune.job import Work
from sidetune.opening import Part, open_jobs
from sidetune.recipe import Recipe
from sidetune.side_fit import fit_sides, new_member, open_fleet
from sidetune.sweep import sweep
from sidetune.waves import member_bytes

METHODS = ["lora", "norms", "bitfit", "vpt", "full"]  # adaptformer needs timm's blocks


def work(pictures: Path, out: Path, recipe: Recipe) -> Work:
    backbone = build_backbone("toy", taps=["image", "embedding", "block.4"])
    dataset = load_dataset(pictures)
    out.mkdir(parents=True, exist_ok=True)
    jobs = open_jobs(
        [Part("", recipe, dataset, out)],
        backbone,
        sample_keys(dataset),
        out=out,
        store=out / "store",
        quiet=True,
    )
    return Work(jobs, recipe, out)


def outputs(pictures: Path, out: Path, side: str, *settings: str) -> Tensor:
    trained = work(pictures, out, toy_recipe(side, "features.dtype=fp32", *settings))
    digest = weights_digest(trained.common.backbone.module)
    (fitted,) = fit_sides(trained)
    assert len(fitted.history) == 2
    assert fitted.history[1].loss < fitted.history[0].loss
    assert weights_digest(trained.common.backbone.module) == digest
    return fitted.outputs("test")


@pytest.mark.parametrize("side", METHODS)
def test_stored_equals_live_and_twice_is_the_same(side: str, pictures: Path, tmp_path: Path) -> None:
    stored = outputs(pictures, tmp_path / "stored", side)
    assert torch.equal(outputs(pictures, tmp_path / "again", side), stored)
    live = outputs(pictures, tmp_path / "live", side, "features.mode=live")
    torch.testing.assert_close(live, stored, rtol=1e-4, atol=1e-5)


def test_resumes_where_it_was(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = outputs(image_folder, tmp_path / "whole", "lora")
    recipe, step, calls = toy_recipe("lora", "features.dtype=fp32"), Bucket.step, 0

    def interrupted(*arguments: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        step(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("sidetune.train"), "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(Bucket, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit_sides(work(image_folder, tmp_path / "killed", recipe))
    assert (tmp_path / "killed" / "checkpoint.safetensors").exists()
    (fitted,) = fit_sides(work(image_folder, tmp_path / "killed", recipe))
    assert torch.equal(fitted.outputs("test"), whole)


@pytest.mark.parametrize("begin", [fit, lambda data, **how: sweep(data, trials=2, **how)])
def test_a_baseline_is_measured_not_kept(begin: object, pictures: Path, tmp_path: Path) -> None:
    assert callable(begin)
    with pytest.raises(RequestError, match=r"lora is a baseline.*sidetune bench accuracy"):
        begin(pictures, out=tmp_path / "run", recipe=toy_recipe("lora"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_toy_gives_its_image_back() -> None:
    backbone = ToyBackbone(taps=["image", "block.1"])
    image = torch.rand(2, 3, 32, 32)
    read = backbone(image)["image"]
    assert read.shape == (2, 32 * 32, 3)
    assert torch.equal(read.transpose(1, 2).reshape(2, 3, 32, 32), image)


@pytest.mark.parametrize("side", METHODS)
def test_what_a_step_keeps_grows_with_the_batch_and_holds_no_frozen_weights(
    side: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the weights that linear layers save would be counted once a few samples."""
    trained = work(pictures, tmp_path, toy_recipe(side, "features.dtype=fp32"))
    job = trained.common
    member = new_member(job, trained.recipe, name=side, rows=job.split["train"])
    fleet = open_fleet(job, [member.recipe], member.rows)
    found = []
    for samples in (1, 4):
        monkeypatch.setattr("sidetune.waves.SAMPLES", samples)
        found.append(member_bytes(fleet, member))
    assert found[0] == pytest.approx(found[1], rel=0.02)

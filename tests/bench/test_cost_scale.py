"""What clips cost by model and method: real processes on a small model, and straight lines."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sidetune.bench import cost_scale as module
from sidetune.bench.cost import drawn
from sidetune.bench.cost_cases import CostCase, CostSetting, Trial, trained_as
from sidetune.bench.cost_rows import Measured
from sidetune.bench.cost_scale import GB, MODELS, Line, Model, bench_scale, require_video, scale_rows
from sidetune.bench.rows import Bench
from sidetune.bench.timing import Timing
from sidetune.errors import BackboneError, RequestError, SidetuneError

SETTING = CostSetting(
    backbone="timm:vit_tiny_patch16_224", size=32, batch=1, frames=2, rounds=1, threads=1, precision="bf16"
)
PARSED = {name: CostCase.parse(name) for name in ("losa", "full")}


def test_small_depths_say_what_the_whole_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MODELS", {"ViT-Ti": SETTING.backbone})
    bench = bench_scale(SETTING, cases=["full"], quiet=True)
    parameters = bench.row("scale/all/ViT-Ti", "backbone_parameters").value
    held = bench.row("scale/full/ViT-Ti", "held_bytes")
    assert held.against == "computed", "it fits"
    assert held.ratio == pytest.approx(1, abs=0.2)
    # weights, gradients and the two moments of Adam, each in float32, and activations
    assert 16 * parameters < held.value < 16 * parameters + 1.2e7
    assert bench.row("scale/full/8 GB", "largest_parameters").value == parameters
    assert max(map(len, bench.lines())) <= 80
    assert bench.environment["setting"]["models"] == [SETTING.backbone]
    assert "backbone" not in bench.environment["setting"]


def test_a_line_goes_through_both_and_never_falls() -> None:
    assert Line((2, 4), (3.0, 5.0)).at(12) == pytest.approx(13.0)
    assert Line((2, 4), (5.0, 4.9)).at(12) == 4.9


def test_known_without_being_made() -> None:
    model = Model.of(replace(SETTING, backbone=MODELS["EVA-E"]))
    assert model.depth == 64
    assert 4.3e9 < model.parameters < 4.4e9
    assert [Model.of(replace(SETTING, backbone=name)).depth for name in MODELS.values()] == [
        *(12, 12, 24, 40, 48, 64)
    ]


TWICE = 1.5  # what is measured of a whole model, over the line


def fake(seconds: float, gigabytes: float, fails: bool = False):
    """A block takes so many seconds and GB, and full fine-tuning twice that."""
    asked = []

    def measure(setting: CostSetting, cases: dict[str, CostCase]) -> dict[str, Measured]:
        (name,) = cases
        asked.append((name, setting.depth))
        if fails and setting.depth is None:
            raise SidetuneError("killed")
        times = (setting.depth or 12) * (2 if name == "full" else 1) * (1 if setting.depth else TWICE)
        took = Timing(times * seconds, times * seconds, times * seconds)
        return {name: Measured(took, 1, 0, held_bytes=int(times * gigabytes * GB))}

    return measure, asked


def rows(measure, failed: dict[str, str] | None = None) -> Bench:
    models = {"a": Model(replace(SETTING, backbone="timm:a"), 12, 86_000_000)}
    found = scale_rows(models, PARSED, (8,), measure, 20 * GB, {} if failed is None else failed)
    return Bench(tuple(found), {})


@pytest.mark.parametrize(
    ("seconds", "gigabytes", "whole"),
    [
        (1.0, 0.5, ["losa", "full"]),
        (1.0, 1.0, ["losa"]),
        (4.0, 0.5, ["losa"]),
        (0.1, 3.0, []),
        (9.0, 0.1, []),
    ],
)
def test_measured_where_it_fits_and_is_no_longer_than_a_minute(
    seconds: float, gigabytes: float, whole: list[str]
) -> None:
    measure, asked = fake(seconds, gigabytes)
    bench = rows(measure)
    assert [name for name, depth in asked if depth is None] == whole
    for name, times in (("losa", 12), ("full", 24)):
        step, held = (bench.row(f"scale/{name}/a", metric) for metric in ("step_s", "held_bytes"))
        measured = name in whole
        assert step.value == pytest.approx(times * seconds * (TWICE if measured else 1))
        assert step.unit == ("s" if measured else "s, computed")
        assert step.ratio == (pytest.approx(TWICE) if measured else None)
        for size in (8, 24, 80, 141):
            fits = bench.row(f"scale/{name}/{size} GB", "largest_parameters").value
            assert fits == (86_000_000 if held.value <= size * GB else 0)
    about = {"cpu": "", "threads": 1, "cores": 1, "gpu": None, "torch": "", "commit": None}
    lines = "\n".join(Bench(bench.rows, about).lines())
    assert ("*" in lines.replace("; *", "")) == (len(whole) < 2)
    assert ("Measured over computed, where both are: 1.5 .. 1.5" in lines) == bool(whole)


def test_a_whole_model_that_fails_leaves_what_was_computed() -> None:
    measure, asked = fake(1.0, 0.5, fails=True)
    failed: dict[str, str] = {}
    bench = rows(measure, failed)
    assert ("losa", None) in asked
    assert bench.row("scale/losa/a", "step_s").unit == "s, computed"
    assert failed == {"losa/a": "killed", "full/a": "killed"}


def test_several_numbers_of_frames_are_lines_of_their_own() -> None:
    def measure(setting: CostSetting, cases: dict[str, CostCase]) -> dict[str, Measured]:
        assert setting.frames is not None
        took = Timing(setting.frames, setting.frames, setting.frames)
        return {name: Measured(took, 1, 0, held_bytes=setting.frames * GB) for name in cases}

    models = {"a": Model(replace(SETTING, backbone="timm:a"), 12, 86_000_000)}
    bench = Bench(tuple(scale_rows(models, PARSED, (8, 16), measure, 100 * GB, {})), {})
    for frames, fits in ((8, 86_000_000), (16, 0)):
        assert bench.row(f"scale/full T={frames}/a", "step_s").value == frames
        assert bench.row(f"scale/full T={frames}/8 GB", "largest_parameters").value == fits
    assert len([row for row in bench.rows if row.metric == "backbone_parameters"]) == 1


def test_what_is_there_twice_must_fit_twice() -> None:
    measure, asked = fake(1.0, 0.5)

    def doubled(setting: CostSetting, cases: dict[str, CostCase]) -> dict[str, Measured]:
        return {name: replace(one, doubled_bytes=15 * GB) for name, one in measure(setting, cases).items()}

    rows(doubled)
    assert all(depth is not None for _, depth in asked)


def test_few_blocks_streamed_are_those_in_memory(tmp_path: Path) -> None:
    setting = drawn(replace(SETTING, depth=2), tmp_path / "weights.safetensors")
    streamed = setting.build_backbone(streamed=True)
    backbone = setting.build_backbone()
    assert streamed.spec == backbone.spec
    assert backbone.spec.names == ("embedding", "block.1", "block.2")
    images = torch.zeros(1, 3, 32, 32)
    assert [one.shape for one in streamed(images).layers] == [one.shape for one in backbone(images).layers]


def test_what_a_baseline_trains_counts_once() -> None:
    trial = Trial(CostCase.parse("full"), replace(SETTING, depth=2))
    model = trial.seat()
    head = 10 * 192 * 4
    assert 0 < model - trial.doubled_bytes() < 2 * head, "the head and the norm are its own"
    assert Trial(CostCase.parse("losa"), replace(SETTING, depth=2)).doubled_bytes() == 0


def test_a_baseline_runs_its_blocks_as_the_backbone_does() -> None:
    losa, full = (trained_as(case.recipe, SETTING) for case in PARSED.values())
    assert (losa.precision, full.precision) == ("auto", "bf16")
    assert trained_as(PARSED["full"].recipe, replace(SETTING, precision="fp32")).precision == "fp32"
    asked = CostCase.parse("lora-bf16").recipe
    assert trained_as(asked, replace(SETTING, precision="fp32")).precision == "bf16", "as its name says"
    assert full.batch_size == 1
    with pytest.raises(RequestError, match="precision is fp16 and full a baseline"):
        trained_as(PARSED["full"].recipe, replace(SETTING, precision="fp16"))


def test_bad_requests() -> None:
    for options, said in (
        ({"models": ["ViT-X"]}, r"--models names 'ViT-X'. Did you mean"),
        ({"cases": ["losa-stored"]}, r"'losa-stored' is stored, expected live ones. Type: --cases losa"),
        ({"cases": []}, r"no case is named, expected one or more"),
        (
            {"models": ["ViT-S", "EVA-E"], "cases": ["losa", "adaptformer"]},
            r"'adaptformer' does not go with EVA-E: AdaptFormer needs .* Type: --models or --cases without",
        ),
    ):
        with pytest.raises(RequestError, match=said):
            bench_scale(SETTING, **options)
    with pytest.raises(RequestError, match="Type: --frames 8"):
        bench_scale(replace(SETTING, frames=None))
    with pytest.raises(RequestError, match="Type: --video"):
        require_video(False, "ViT-S", None, SETTING.backbone)
    with pytest.raises(
        RequestError, match=r"--frames is 8,16 without --video, expected one. Type: --frames 8"
    ):
        require_video(False, None, None, SETTING.backbone, [8, 16])
    with pytest.raises(RequestError, match="--growth without --video"):
        require_video(True, None, "batch", CostSetting.backbone)
    with pytest.raises(RequestError, match=r"which has models of its own, ViT-S, .* Type: --models ViT-B"):
        require_video(True, None, None, "toy")
    with pytest.raises(RequestError, match="cannot be streamed or cut"):
        _ = replace(SETTING, backbone="toy").model
    with pytest.raises(BackboneError, match="no model 'vit_none'"):
        replace(SETTING, backbone="timm:vit_none", depth=2).build_backbone()

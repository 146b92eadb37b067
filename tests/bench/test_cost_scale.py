"""What clips cost by model and method: real processes on a small model, and straight lines."""

from dataclasses import replace

import pytest
import torch

from sidetune.bench import cost_scale as module
from sidetune.bench.cost_cases import CostCase, CostSetting, Trial, trained_as
from sidetune.bench.cost_rows import Measured
from sidetune.bench.cost_scale import GB, MODELS, Line, Model, bench_scale, require_video, scale_rows
from sidetune.bench.rows import Bench
from sidetune.bench.timing import Timing
from sidetune.errors import BackboneError, RequestError

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
    # weights, gradients and the two moments of Adam, each in float32, and what libraries take once
    assert 16 * parameters < held.value < 16 * parameters + 2e8
    assert bench.row("scale/full/8 GB", "largest_parameters").value == parameters
    assert max(map(len, bench.lines())) <= 80
    assert bench.environment["setting"]["models"] == [SETTING.backbone]


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


def fake(seconds: float, gigabytes: float):
    """A block takes so many seconds and GB, and full fine-tuning ten times that."""
    asked = []

    def measure(setting: CostSetting, cases: dict[str, CostCase]) -> dict[str, Measured]:
        asked.append((setting.backbone, setting.depth, tuple(cases)))
        depth, found = setting.depth or 12, {}
        for name in cases:
            times = depth * (10 if name == "full" else 1)
            took = Timing(times * seconds, times * seconds, times * seconds)
            found[name] = Measured(took, 1, 0, held_bytes=int(times * gigabytes * GB))
        return found

    return measure, asked


@pytest.mark.parametrize(("seconds", "gigabytes", "whole"), [(1.0, 0.5, ["losa"]), (9.0, 0.1, [])])
def test_measured_where_it_fits_and_is_no_longer_than_a_minute(
    seconds: float, gigabytes: float, whole: list[str]
) -> None:
    measure, asked = fake(seconds, gigabytes)
    models = {"a": Model(replace(SETTING, backbone="timm:a"), 12, 86_000_000)}
    bench = Bench(tuple(scale_rows(models, PARSED, measure, room=20 * GB)), {})
    assert asked[:2] == [("timm:a", depth, ("losa", "full")) for depth in (2, 4)]
    assert asked[2:] == ([("timm:a", None, tuple(whole))] if whole else [])
    for name, times in (("losa", 1), ("full", 10)):
        row = bench.row(f"scale/{name}/a", "step_s")
        assert row.value == pytest.approx(12 * times * seconds)
        assert row.unit == ("s" if name in whole else "s, computed")
        held = bench.row(f"scale/{name}/a", "held_bytes").value
        for size in (8, 24, 80, 141):
            fits = bench.row(f"scale/{name}/{size} GB", "largest_parameters").value
            assert fits == (86_000_000 if held <= size * GB else 0)
    about = {"cpu": "", "threads": 1, "cores": 1, "gpu": None, "torch": "", "commit": None}
    lines = "\n".join(Bench(bench.rows, about).lines())
    assert f"{120 * seconds:.0f}*" in lines


def test_few_blocks_and_the_file_that_is_streamed_have_the_same_shapes() -> None:
    setting = replace(SETTING, depth=2)
    backbone = setting.build_backbone()
    assert backbone.spec.names == ("embedding", "block.1", "block.2")
    images = torch.zeros(1, 3, 32, 32)
    assert backbone(images).layers[0].shape == (1, 5, 192)


def test_what_a_baseline_trains_counts_once() -> None:
    trial = Trial(CostCase.parse("full"), replace(SETTING, depth=2))
    model = trial.seat()
    head = 10 * 192 * 4
    assert 0 < model - trial.doubled_bytes() < 2 * head, "the head and the norm are its own"
    assert Trial(CostCase.parse("losa"), replace(SETTING, depth=2)).doubled_bytes() == 0


def test_a_baseline_runs_its_blocks_as_the_backbone_does() -> None:
    losa, full = (trained_as(case.recipe, SETTING) for case in PARSED.values())
    assert (losa.precision, full.precision) == ("auto", "bf16")
    assert trained_as(PARSED["full"].recipe, replace(SETTING, precision="fp32")).precision == "auto"
    assert full.batch_size == 1


def test_bad_requests() -> None:
    for options, said in (
        ({"models": ["ViT-X"]}, r"--models names 'ViT-X'. Did you mean"),
        ({"cases": ["losa-stored"]}, r"'losa-stored' is stored, expected live ones. Type: --cases losa"),
    ):
        with pytest.raises(RequestError, match=said):
            bench_scale(SETTING, **options)
    with pytest.raises(RequestError, match="Type: --frames 8"):
        bench_scale(replace(SETTING, frames=None))
    with pytest.raises(RequestError, match="Type: --video"):
        require_video(False, "ViT-S", None)
    with pytest.raises(RequestError, match="--growth without --video"):
        require_video(True, None, "batch")
    with pytest.raises(RequestError, match="cannot be streamed or cut"):
        _ = replace(SETTING, backbone="toy").model
    with pytest.raises(BackboneError, match="no model 'vit_none'"):
        replace(SETTING, backbone="timm:vit_none", depth=2).build_backbone()

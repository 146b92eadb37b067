"""``sidetune bench cost --video``: what training on clips costs, from 0.02 to 4.4 billion parameters.

All blocks of a vision transformer are alike: a step's time and memory grow by the same with each. So every
model is measured at two small depths, at its own width, and a straight line through both says what the whole
one takes: **computed**. Where that fits the memory that is free, and a step is no longer than a minute, the
whole model is **measured**, too, and the measured value stands, with its ratio to the computed one. Each case
runs alone, so that all memory is its own.

Memory is all that a step holds: the backbone's weights (of a streamed one a block, on a GPU two), what is
trained, gradients, the optimiser's state, activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from sidetune.backbones.blocks import numbered
from sidetune.backbones.random_weights import weight_shapes
from sidetune.backbones.streamed import BLOCKS
from sidetune.baselines import BASELINES
from sidetune.baselines.base import BaselineRecipe
from sidetune.bench.cost import measure
from sidetune.bench.cost_cases import CostCase, CostSetting
from sidetune.bench.cost_growth import Measure
from sidetune.bench.cost_rows import Measured
from sidetune.bench.rows import Bench, Row, describe_machine
from sidetune.bench.shallow import outline_stages
from sidetune.errors import RequestError, SidetuneError, nearest, without_remedy
from sidetune.features import Spec, Tap
from sidetune.machine import free_memory
from sidetune.progress import say
from sidetune.threads import torch_threads

MODELS = {
    "ViT-S": "timm:vit_small_patch14_dinov2",
    "ViT-B": "timm:vit_base_patch14_dinov2",
    "ViT-L": "timm:vit_large_patch14_dinov2",
    "ViT-g": "timm:vit_giant_patch14_dinov2",
    "ViT-G": "timm:vit_gigantic_patch14_clip_224",
    "EVA-E": "timm:eva02_enormous_patch14_clip_224",
}
CASES = ("losa", "losa-streamed", "last", "stadapter", "full", "full-checkpointing")
DEPTHS = (2, 4)  # a line's two points
DEVICES = (8, 24, 80, 141)  # GB of memory: what people have
GB = 10**9
LONGEST = 60.0  # seconds of a step that is measured
SPARE = 0.8  # of free memory: the rest is for what a worker holds before it begins
COMPUTED = "computed"
UNITS = {"step_s": "s", "held_bytes": "B"}
UNUSED = ("backbone", "images", "epochs")  # of a setting


@dataclass(frozen=True)
class Model:
    """What is known of a model without making it.

    Args:
        setting: that it is measured in.
        depth: L, its blocks.
        parameters: all of them.
    """

    setting: CostSetting
    depth: int
    parameters: int

    @classmethod
    def of(cls, setting: CostSetting) -> Model:
        """A setting's model.

        Raises:
            RequestError: it is no model of timm.
        """
        shapes, block = weight_shapes(setting.model), numbered(BLOCKS)
        blocks = [int(found[1]) for name in shapes if (found := block.fullmatch(name))]
        return cls(setting, max(blocks) + 1, sum(map(math.prod, shapes.values())))

    def of_clips(self, frames: int) -> Model:
        """The same with clips of so many frames."""
        return replace(self, setting=replace(self.setting, frames=frames))


@dataclass(frozen=True)
class Line:
    """A straight line through what was measured at two depths."""

    depths: tuple[int, int]
    values: tuple[float, float]

    def at(self, depth: int) -> float:
        """Its value there. Noise may make it fall; it is never below what was measured."""
        (near, far), (low, high) = self.depths, self.values
        slope = max(0.0, (high - low) / (far - near))
        return high + slope * (depth - far)


def bench_scale(
    setting: CostSetting,
    models: Sequence[str] = (),
    *,
    frames: Sequence[int] = (),
    cases: Sequence[str] = CASES,
    quiet: bool = False,
) -> Bench:
    """Time and memory of a step on clips by model and method, and the largest model that a device trains.

    Args:
        setting: sizes; its backbone is not heeded.
        models: of `MODELS`; none: all.
        frames: T of a clip, of each case one after the other; none: the setting's.
        cases: as `CostCase.parse` reads them, live ones.
        quiet: no progress.

    Returns:
        Rows ``scale/CASE/MODEL`` of ``step_s`` and ``held_bytes``, whose unit says where they are computed;
        ``scale/CASE/24 GB`` of ``largest_parameters``; ``scale/all/MODEL`` of ``backbone_parameters``. Where
        there are several T, ``CASE T=16`` is what stands for a case.

    Raises:
        RequestError: an unknown model or case, no clips, or a method that a model's blocks do not take.
        SidetuneError: the process of a case at a small depth failed.
    """
    chosen = _chosen(models)
    counts = frames or (() if setting.frames is None else (setting.frames,))
    if not counts:
        raise RequestError("frames is not given, expected those of a clip. Type: --frames 8")
    parsed = {name: CostCase.parse(name) for name in cases}
    if not parsed:
        raise RequestError(f"no case is named, expected one or more. Type: --cases {CASES[0]}")
    if stored := [name for name, case in parsed.items() if case.stored]:
        raise RequestError(f"case {stored[0]!r} is stored, expected live ones. Type: --cases {CASES[0]}")
    known = {label: Model.of(replace(setting, backbone=name)) for label, name in chosen.items()}
    for (label, model), (name, case) in product(known.items(), parsed.items()):
        _require_fitting(label, model.setting, name, case)
    room, failed = SPARE * free_memory(setting.device), dict[str, str]()
    rows = list(scale_rows(known, parsed, counts, partial(measure, quiet=quiet), room, failed))
    for what, reason in failed.items():
        say(f"{what}: not measured whole, {reason}", quiet=quiet)
    with torch_threads(setting.threads):
        sizes = {name: value for name, value in setting.to_json().items() if name not in UNUSED}
        sizes |= {"models": list(chosen.values()), "cases": list(cases)}
        sizes |= {"frames": list(counts) if len(counts) > 1 else counts[0]}
        about = describe_machine(torch.device(setting.device), sizes)
        return Bench(tuple(rows), {**about, "not_measured_whole": failed})


def require_video(
    video: bool, models: str | None, growth: str | None, backbone: str, frames: Sequence[int] = ()
) -> None:
    """Options that go together.

    Raises:
        RequestError: models or several numbers of frames without video, or with it what is not heeded there.
    """
    if not video:
        if models is not None:
            raise RequestError(f"--models is {models} without --video, expected both. Type: --video")
        if len(frames) > 1:
            several = ",".join(map(str, frames))
            raise RequestError(
                f"--frames is {several} without --video, expected one. Type: --frames {frames[0]}"
            )
        return
    if growth is not None:
        raise RequestError(f"--growth is {growth} with --video, expected one. Type: --growth without --video")
    if backbone != CostSetting.backbone:
        raise RequestError(
            f"--backbone is {backbone} with --video, which has models of its own, {', '.join(MODELS)}. "
            "Type: --models ViT-B"
        )


def scale_rows(
    models: Mapping[str, Model],
    cases: Mapping[str, CostCase],
    frames: Sequence[int],
    measure: Measure,
    room: float,
    failed: dict[str, str],
) -> Iterator[Row]:
    """The rows of a run.

    Args:
        models: by label.
        cases: by name.
        frames: T of a clip, one or more.
        measure: a setting and cases -> what was measured.
        room: bytes that a process with a whole model may hold.
        failed: case and model -> why it could not be measured whole, though it should fit; added to.
    """
    held: dict[tuple[str, str], float] = {}
    for label, model in models.items():
        yield Row(f"scale/all/{label}", "backbone_parameters", model.parameters, "")
        for (name, case), count in product(cases.items(), frames):
            line = name if len(frames) == 1 else f"{name} T={count}"
            found = _measured(model.of_clips(count), {name: case}, measure, room)
            if found.reason:
                failed[f"{line}/{label}"] = found.reason
            for metric in UNITS:
                row = found.row(f"scale/{line}/{label}", metric)
                if metric == "held_bytes":
                    held[line, label] = row.value
                yield row
    for line, gigabytes in product(dict.fromkeys(line for line, _ in held), DEVICES):
        fitting = [models[label].parameters for label in models if held[line, label] <= gigabytes * GB]
        yield Row(f"scale/{line}/{gigabytes} GB", "largest_parameters", max(fitting, default=0), "")


@dataclass(frozen=True)
class Point:
    """What a case takes of a model.

    Args:
        computed: by metric.
        whole: measured; None where it does not fit, or failed.
        reason: why it failed.
    """

    computed: Mapping[str, float]
    whole: Measured | None = None
    reason: str = ""

    def row(self, case: str, metric: str) -> Row:
        """The measured value where there is one, with its ratio to the computed one."""
        computed = self.computed[metric]
        if self.whole is None:
            return Row(case, metric, computed, f"{UNITS[metric]}, {COMPUTED}")
        value, timing = _value(self.whole, metric), self.whole.timing
        spread = (timing.least, timing.most) if metric == "step_s" else None
        return Row(case, metric, value, UNITS[metric], COMPUTED, value / computed, spread=spread)


def _chosen(models: Sequence[str]) -> dict[str, str]:
    for label in models:
        if label not in MODELS:
            raise RequestError(f"--models names {label!r}.{nearest(label, MODELS)}")
    return {label: name for label, name in MODELS.items() if label in models or not models}


def _require_fitting(label: str, setting: CostSetting, name: str, case: CostCase) -> None:
    """A baseline must find in a model's blocks what it changes; tried on one block without numbers."""
    if case.recipe is None or not isinstance(case.recipe.side, BaselineRecipe):
        return
    side = case.recipe.side
    try:
        with torch.device("meta"):
            stages = outline_stages(setting.model)
            first = BASELINES[side.name].first_tap(len(stages.blocks), side)
            tap = replace(stages.tap, name=first, kind="embedding")
            pixels = Tap("image", "image", 3, (1, 1, 1))
            BASELINES[side.name](Spec((pixels if first == "image" else tap,)), stages, side)
    except SidetuneError as error:
        raise RequestError(
            f"case {name!r} does not go with {label}: {without_remedy(error)}. Type: --models or --cases "
            "without it"
        ) from error


def _measured(model: Model, case: Mapping[str, CostCase], measure: Measure, room: float) -> Point:
    """A case at two small depths, and whole where the line says that it fits."""
    (name,) = case
    near, far = (measure(replace(model.setting, depth=depth), case)[name] for depth in DEPTHS)

    def at(metric: str) -> float:
        return Line(DEPTHS, (_value(near, metric), _value(far, metric))).at(model.depth)

    computed = {metric: at(metric) for metric in UNITS}
    if computed["held_bytes"] + at("doubled_bytes") > room or computed["step_s"] > LONGEST:
        return Point(computed)
    try:
        return Point(computed, measure(model.setting, case)[name])
    except SidetuneError as error:  # what was computed stands
        return Point(computed, reason=str(error))


def _value(one: Measured, metric: str) -> float:
    value = getattr(one, metric)
    assert value is not None
    return float(value)

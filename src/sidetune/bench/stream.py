"""``sidetune bench stream``: what a backbone costs whose blocks stay on disk, beside the same in memory.

Weights are random, for cost needs no knowledge; they are written block by block and never whole in memory.
Each case has a process of its own, as in `sidetune.bench.cost`, whose workers these are. What a process ever
held counts here, libraries and all: it is what a machine must have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sidetune.backbones.weightfile import stored_tensors
from sidetune.bench.cost import drawn, measure
from sidetune.bench.cost_cases import FEATURES, FORWARD, STREAMED, CostCase, CostSetting
from sidetune.bench.cost_rows import Measured
from sidetune.bench.rows import Bench, Row, describe_machine
from sidetune.bench.stores import temporary_folder
from sidetune.errors import RequestError
from sidetune.machine import free_memory
from sidetune.threads import torch_threads

GOAL = CostSetting(backbone="timm:eva02_enormous_patch14_clip_224", batch=1, frames=8, precision="bf16")
GOAL_STEP = f"losa-{STREAMED}"
FEATURES_BYTES, STEP_BYTES = 1.5 * 2**30, 3 * 2**30  # that a process may hold: the goals at that setting
LEAST_RATE, CHUNK = 0.8, 64  # of the rate in memory, where a call has so many images or more
ROOM = 3  # a model in memory takes its weights in float32, its file while it loads, and a batch beside them


@dataclass(frozen=True)
class StreamCases:
    """Which cases run.

    Args:
        side: the side network whose training step is measured.
        in_memory: whether the model in memory is measured, too.
    """

    side: str
    in_memory: bool

    @property
    def features(self) -> str:
        """All taps of a batch, streamed."""
        return f"{FEATURES}-{STREAMED}"

    @property
    def step(self) -> str:
        """A training step on them."""
        return f"{self.side}-{STREAMED}"

    @property
    def forward(self) -> str:
        """The backbone alone."""
        return f"{FORWARD}-{STREAMED}"

    @property
    def names(self) -> tuple[str, ...]:
        """In the order that they are measured in."""
        return (self.features, self.step, self.forward, *([FORWARD] if self.in_memory else []))


def bench_stream(
    setting: CostSetting, *, side: str = "losa", weights: Path | None = None, quiet: bool = False
) -> Bench:
    """Memory and time of features and of a training step, streamed; the rate beside the model in memory.

    Args:
        setting: a timm model and sizes.
        side: the side network of the step.
        weights: file of its random weights, written where it is not there; None: in a folder that is removed.
        quiet: no progress.

    Raises:
        RequestError: no such side network, a backbone that cannot be streamed, or no name of such a file.
        SidetuneError: no room on the disk, or a case's process failed.
    """
    CostCase.parse(StreamCases(side, in_memory=False).step)
    if weights is not None and weights.suffix != ".safetensors":
        raise RequestError(
            f"weights {weights}, expected a .safetensors file. Type: --weights random.safetensors"
        )
    with temporary_folder() as folder:
        setting = drawn(setting, folder / "weights.safetensors" if weights is None else weights)
        assert setting.weights is not None
        tensors = stored_tensors(Path(setting.weights)).values()
        parameters = sum(math.prod(one.shape) for one in tensors)
        in_memory = ROOM * parameters * torch.float32.itemsize < free_memory(setting.device)
        cases = StreamCases(side, in_memory=in_memory)
        parsed = {name: CostCase.parse(name) for name in cases.names}
        measured = measure(setting, parsed, quiet=quiet)
        rows = [
            Row("backbone", "backbone_parameters", parameters, ""),
            Row("backbone", "file_bytes", sum(one.nbytes for one in tensors), "B"),
            *_rows(setting, cases, measured),
        ]
    with torch_threads(setting.threads):
        sizes = {**replace(setting, weights=None).to_json(), "cases": list(cases.names)}
        return Bench(tuple(rows), describe_machine(torch.device(setting.device), sizes))


def _rows(setting: CostSetting, cases: StreamCases, measured: Mapping[str, Measured]) -> Iterator[Row]:
    goals = {cases.features: FEATURES_BYTES, GOAL_STEP: STEP_BYTES} if _is_the_goal(setting) else {}
    for name, one in measured.items():
        held = one.resident_bytes
        assert held is not None, "streamed cases say it"
        yield Row(name, "resident_bytes", held, "B", goal=goals.get(name))
    for name, one in measured.items():
        yield one.timing.row(name, "step_s", "s", 1 / one.steps)

    def rate(name: str) -> Row:
        return measured[name].timing.rate(name, "images_per_s", "images/s", setting.pictures)

    if not cases.in_memory:
        yield rate(cases.forward)
        return
    yield rate(cases.forward).to(rate(FORWARD), goal=LEAST_RATE if setting.pictures >= CHUNK else None)
    yield rate(FORWARD)


def _is_the_goal(setting: CostSetting) -> bool:
    own = ("backbone", "size", "batch", "frames", "device", "precision")
    return all(getattr(setting, name) == getattr(GOAL, name) for name in own)

"""Cases in turn, round after round: what else the machine does meets all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from sidetune.bench.rows import Row
from sidetune.progress import Progress

LEAST_SECONDS = 0.05  # of one case in one round: shorter calls are repeated, the clock is not that fine
MOST_CALLS = 100


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a case: median, least and largest of the rounds."""

    median: float
    least: float
    most: float

    def row(self, case: str, metric: str, unit: str, scale: float) -> Row:
        """As a row, in units of 1 / `scale` seconds."""
        spread = (self.least * scale, self.most * scale)
        return Row(case, metric, self.median * scale, unit, spread=spread)

    def rate(self, case: str, metric: str, unit: str, amount: float) -> Row:
        """As a row of `amount` a second."""
        spread = (amount / self.most, amount / self.least)
        return Row(case, metric, amount / self.median, unit, spread=spread)


Name = TypeVar("Name", bound=Hashable)


def in_turn(
    cases: Mapping[Name, Callable[[], object]],
    rounds: int,
    *,
    label: str = "bench",
    device: torch.device | None = None,
    quiet: bool = True,
) -> dict[Name, Timing]:
    """Time every case once a round: A, B, C, A, B, C, ..

    A first call warms up and says how often a short case is called a round.

    Args:
        cases: name -> what to call.
        rounds: how many.
        label: of the progress.
        device: waited for before the clock is read, where it is a GPU.
        quiet: no progress.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in cases}
    calls = {}
    with Progress(label, (rounds + 1) * len(cases), "cases", quiet=quiet) as progress:
        for name, call in cases.items():
            call()  # threads start, memory is taken
            calls[name] = min(MOST_CALLS, math.ceil(LEAST_SECONDS / max(_timed(call, 1, device), 1e-9)))
            progress.advance(1)
        for _ in range(rounds):
            for name, call in cases.items():
                seconds[name].append(_timed(call, calls[name], device))
                progress.advance(1)
    return {name: Timing(statistics.median(times), min(times), max(times)) for name, times in seconds.items()}


def _timed(call: Callable[[], object], times: int, device: torch.device | None) -> float:
    """Seconds a call."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return (time.perf_counter() - started) / times


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)

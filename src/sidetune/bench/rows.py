"""What every bench returns: rows, each with the case that its ratio is to, and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch

from sidetune.runs import environment

# metrics whose goal is a least ratio; of all others it is a largest
MORE_IS_BETTER = ("gb_per_s", "images_per_s", "accuracy")
SHOWN_UNITS = ("MB", "GB/s", "GFLOP/s", "x")  # others stand in the heading
LINE = 78  # columns beside the margin
GROWTHS = {
    "ms_per_image": "How the time grows, ms an image",
    "step_s": "How the time of a step grows, s",
    "peak_bytes": "How the peak memory of a step grows, MB",
    "job_s": "How the whole job grows, s, computed",
}
SCALES = {
    "backbone_parameters": "Parameters, billions",
    "step_s": "Time of a step, s; * computed from small depths",
    "held_bytes": "All that a step holds in memory, GB; * computed from small depths",
    "largest_parameters": "The largest backbone of these that a device trains, billions of parameters",
}
MEANINGS = {
    "ms_per_image": "Time, ms an image",
    "kept_bytes": "Kept for backward, beside the stored taps",
    "losa_bytes": "The stored taps that LoSA reads, a batch",
    "last_bytes": "The stored taps that LAST reads, a batch",
    "times_floor": "Time, in multiples of the floor",
    "peak_bytes": "Peak memory of a step, above what was loaded before it",
    "resident_bytes": "The most that a process held, libraries and all",
    "step_s": "Time of a step, s",
    "images_per_s": "Images a second",
    "tap_bytes": "Of that, a batch's taps",
    "parameters": "Trained parameters, without the head",
    "artifact_bytes": "What a run keeps",
    "job_s": "The whole job, s, computed from steps and extraction",
    "accuracy": "Accuracy on test clips, a share, and its 95 % interval",
    "shuffled_accuracy": "The same clips, the frames of each in another order",
    "backbone_parameters": "Parameters of the backbone, all frozen",
    "file_bytes": "The backbone's file",
    "gb_per_s": "Reading, GB/s of stored bytes",
    "gflop_per_s": "The machine: one large product, GFLOP/s",
}


@dataclass(frozen=True)
class Row:
    """One measured number.

    Args:
        case: what was measured.
        metric: of it.
        value: in `unit`; of several rounds the median.
        unit: as ``ms``, ``B``, ``GB/s``.
        against: the case, measured in the same run, that the ratio is to; None where there is none.
        ratio: value over that case's value.
        goal: the ratio that is aimed at (for a metric without a ratio: the value); None: no goal.
        spread: least and largest of the rounds; None where nothing was repeated.
    """

    case: str
    metric: str
    value: float
    unit: str
    against: str | None = None
    ratio: float | None = None
    goal: float | None = None
    spread: tuple[float, float] | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none."""
        if self.goal is None:
            return None
        reached = self.value if self.ratio is None else self.ratio
        return reached >= self.goal if self.metric in MORE_IS_BETTER else reached <= self.goal

    def to(self, other: Row, name: str | None = None, *, goal: float | None = None) -> Row:
        """This row with its ratio to another.

        Args:
            other: the row in the denominator.
            name: to write for it; None: its case.
            goal: that the ratio is aimed at.
        """
        return replace(self, against=name or other.case, ratio=self.value / other.value, goal=goal)


@dataclass(frozen=True)
class Bench:
    """Rows, and the machine and setting that they were measured on.

    Args:
        rows: in the order in which they are printed.
        environment: plain JSON values.
    """

    rows: tuple[Row, ...]
    environment: Mapping[str, Any]

    def row(self, case: str, metric: str, against: str | None = None) -> Row:
        """The row of a case and a metric, with a ratio to `against` where that is asked for; there is one."""
        found = [row for row in self.rows if (row.case, row.metric) == (case, metric)]
        (one,) = (row for row in found if against is None or row.against == against)
        return one

    def to_json(self) -> dict[str, Any]:
        """``{"rows": [..], "environment": {..}}``."""
        return {"rows": [asdict(row) for row in self.rows], "environment": dict(self.environment)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        rows = [
            Row(**{**row, "spread": tuple(row["spread"]) if row["spread"] else None})
            for row in fields["rows"]
        ]
        return cls(tuple(rows), fields["environment"])

    def lines(self) -> Iterator[str]:
        """The text table: a block a metric, at most 80 columns. Growth rows have a table of their own."""
        rows = [row for row in self.rows if not row.case.startswith(("growth/", "scale/"))]
        for metric in dict.fromkeys(row.metric for row in rows):
            yield MEANINGS.get(metric, metric)
            yield from (f"  {_line(row)}".rstrip() for row in rows if row.metric == metric)
            yield ""
        if growth := [row for row in self.rows if row.case.startswith("growth/")]:
            for metric in dict.fromkeys(row.metric for row in growth):
                yield GROWTHS.get(metric, metric)
                yield from _growth_lines([row for row in growth if row.metric == metric])
                yield ""
        if scale := [row for row in self.rows if row.case.startswith("scale/")]:
            for metric, heading in SCALES.items():
                yield heading
                yield from _scale_lines([row for row in scale if row.metric == metric])
                yield ""
        yield from machine_lines(self.environment)


def describe_machine(device: torch.device, setting: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers were measured on.

    Args:
        device: that ran the cases.
        setting: sizes of what was measured, plain JSON values.
    """
    return {
        **environment(device),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "commit": commit(),
        "changed": changed(),
        "setting": dict(setting),
    }


def machine_lines(about: Mapping[str, Any]) -> Iterator[str]:
    """The machine in words.

    Args:
        about: as `describe_machine` gives it.
    """
    yield f"{about['cpu']} · {about['threads']} threads of {about['cores']} cores"
    gpu = "" if about["gpu"] is None else f" · {about['gpu']}"
    beyond = " and changes" if about.get("changed") else ""
    yield f"torch {about['torch']}{gpu} · commit {(about['commit'] or 'unknown')[:12]}{beyond}"


def _line(row: Row) -> str:
    """Case, value and spread, ratio, goal."""
    scale, unit = (1e6, "MB") if row.unit == "B" else (1.0, row.unit)
    spread = "" if row.spread is None else "..".join(_short(one / scale) for one in row.spread)
    ratio = "" if row.ratio is None else f"{_ratio(row.ratio)} of {row.against}"
    ratio = ratio if row.unit != "x" else f"of {row.against}"
    goal = ""
    if row.goal is not None:
        sign = ">=" if row.metric in MORE_IS_BETTER else "<="
        aim = row.goal if row.ratio is not None else row.goal / scale
        goal = f"{sign} {aim:.4g} {'met' if row.met else 'MISSED'}"
    value = f"{_short(row.value / scale)} {unit if unit in SHOWN_UNITS else ''}".strip()
    line = f"{row.case:<13} {value:>12} {spread:>11} {ratio:<22} {goal}".rstrip()
    return line if len(line) <= LINE else " ".join(line.split())


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 10 else _short(value)


def _short(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _growth_lines(rows: Sequence[Row]) -> Iterator[str]:
    """A line a point, a column a case."""
    scale = {"B": 1e6}
    yield from _grid(rows, lambda row: _short(row.value / scale.get(row.unit, 1)), label=8, column=15)


def _scale_lines(rows: Sequence[Row]) -> Iterator[str]:
    """A line a case, a column a model or device."""
    billions = {"held_bytes", "largest_parameters", "backbone_parameters"}

    def cell(row: Row) -> str:
        value = row.value / (1e9 if row.metric in billions else 1)
        return f"{_short(value)}{'*' if row.unit.endswith('computed') else ''}"

    yield from _grid(rows, cell, label=19, column=9)
    both = [row.ratio for row in rows if row.ratio is not None]
    if both:
        yield f"  Measured over computed, where both are: {_short(min(both))} .. {_short(max(both))}"


def _grid(rows: Sequence[Row], cell: Callable[[Row], str], *, label: int, column: int) -> Iterator[str]:
    """Cases ``TABLE/LINE/COLUMN``: a cell each, lines labelled in so many characters or more."""
    cells = {tuple(row.case.split("/")[1:]): cell(row) for row in rows}
    names, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    label = max(label, *(len(name) + 1 for name in names))
    yield f"  {'':<{label}}" + "".join(f"{one:>{column}}" for one in columns)
    for name in names:
        own = (cells.get((name, one), "") for one in columns)
        yield f"  {name:<{label}}" + "".join(f"{one:>{column}}" for one in own)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def note_commit() -> None:
    """Ask for commit and changes now: a long run names those that it began with."""
    commit()
    changed()


@cache
def commit() -> str | None:
    """Of the git checkout that this package runs from; None where it is installed, or git is missing."""
    return _git("rev-parse", "HEAD")


@cache
def changed() -> bool:
    """Whether that checkout has changes that are in no commit."""
    return bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*words: str) -> str | None:
    here = Path(__file__).resolve().parents[3]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

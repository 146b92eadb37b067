"""What the methods of a run share: the job they are given, and what each gives back.

Job      one task on a run's features
Work     jobs that share features and a fleet: one, or one a label column
Fitted   a method of a job, ready to predict
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.backbones.base import Backbone
from sidetune.blend import Solved
from sidetune.checkpoint import Epoch
from sidetune.data.dataset import Dataset, Split
from sidetune.model import SideModel
from sidetune.progress import say
from sidetune.recipe import Recipe
from sidetune.sources import Source
from sidetune.summary import Summary
from sidetune.tasks import Task

if TYPE_CHECKING:
    from sidetune.fleet_fit import FleetResult

MANY_OUTPUTS = 200


@dataclass(frozen=True)
class Job:
    """What every method works from.

    Args:
        recipe: as asked for.
        dataset: every sample.
        backbone: where the source comes from.
        out: the run folder.
        quiet: no progress.
        source: features of every row.
        summary: the same, pooled.
        split: rows of each split that could be read.
        task: measured on the training rows.
        seconds: that features and summary took.
        column: the label column that it learns, where it is one of several; else nothing.
    """

    recipe: Recipe
    dataset: Dataset
    backbone: Backbone
    out: Path
    quiet: bool
    source: Source
    summary: Summary
    split: dict[str, NDArray[np.int64]]
    task: Task
    seconds: float
    column: str = ""

    @property
    def scored_views(self) -> range:
        """Numbers of the views whose outputs are averaged where a split is scored."""
        return range(self.source.reading.scored)

    @cached_property
    def targets(self) -> Tensor:
        """Of every row, as the task takes them; of rows without a class any, for nobody trains on them."""
        targets = self.dataset.targets
        return torch.from_numpy(targets if self.dataset.labelled is None else targets.clip(min=0))

    @cached_property
    def solved(self) -> dict[Any, Solved]:
        """Ridge on some rows, for the members that answer with it; found once."""
        return {}

    @property
    def skipped(self) -> dict[int, str]:
        """Row -> why it could not be read, of the rows that it would learn from or be scored on."""
        known = set(self.dataset.rows("all").tolist())
        return {row: reason for row, reason in self.source.skipped.items() if row in known}

    def named(self, name: str) -> str:
        """A name of its own among the members of a fleet. The folder has no spaces: no two are alike."""
        return f"{self.out.name} {name}" if self.column else name

    def say(self, text: str) -> None:
        """One line on stderr, unless quiet."""
        say(f"{self.column}: {text}" if self.column else text, quiet=self.quiet)


@dataclass(frozen=True)
class Work:
    """Jobs that share features and a fleet.

    Args:
        jobs: one, or one a label column.
        recipe: of all, as asked for.
        out: the folder of all.
    """

    jobs: tuple[Job, ...]
    recipe: Recipe
    out: Path

    @cached_property
    def common(self) -> Job:
        """The first, which speaks for all: source, summary, backbone and views are those of every job."""
        return replace(self.jobs[0], column="")

    @property
    def num_outputs(self) -> int:
        """K of the widest."""
        return max(job.task.num_outputs for job in self.jobs)

    @property
    def checkpoint(self) -> Path:
        """Where training stands, of all members."""
        return self.out / "checkpoint.safetensors"

    def rows(self, *splits: Split) -> NDArray[np.int64]:
        """(n,) that any job has in these splits, ascending."""
        return union([job.split[name] for job in self.jobs for name in splits])


def union(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Rows that are in any part, each once, ascending."""
    return np.unique(np.concatenate(parts))


@dataclass(frozen=True)
class Fitted:
    """A method that is ready to predict: a probe, or the side itself.

    Args:
        name: of its row in the score table.
        model: side, norm and head.
        recipe: with every choice filled in.
        parameters: without the head.
        seconds: that fitting took.
        peak_memory: bytes of this process while it was fitted.
        detail: what was chosen, for the tables.
        outputs: split -> the head's outputs (n, K), on the CPU.
        history: one `Epoch` an epoch; none for what was solved.
        left_out: ridge: outputs (n, K) of the training rows, each fitted on all the others.
        fleet: where several side networks were trained.
    """

    name: str
    model: SideModel
    recipe: Recipe
    parameters: int
    seconds: float
    peak_memory: int
    detail: dict[str, Any]
    outputs: Callable[[str], Tensor]
    history: Sequence[Epoch] = ()
    left_out: Tensor | None = None
    fleet: FleetResult | None = None

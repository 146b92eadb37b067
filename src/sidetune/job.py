"""What the methods of a run share: the job they are given, and what each gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.backbones.base import Backbone
from sidetune.checkpoint import Epoch
from sidetune.data.dataset import Dataset
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

    @property
    def scored_views(self) -> range:
        """Numbers of the views whose outputs are averaged where a split is scored."""
        return range(len(self.source.views) if self.recipe.features.average_views else 1)

    @property
    def targets(self) -> Tensor:
        """Of every row, as the task takes them."""
        return torch.from_numpy(self.dataset.targets)

    def say(self, text: str) -> None:
        """One line on stderr, unless quiet."""
        say(text, quiet=self.quiet)


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

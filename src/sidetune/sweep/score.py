"""What a trial is scored on: held-out folds of train and val, or the validation split.

A trial has a member for each fold; what they say of the rows that they did not train on is pooled, and
scored as one. With the validation split there is one member and one such fold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.bucket import Member
from sidetune.calibration import plain
from sidetune.data.folds import dataset_folds, given_folds
from sidetune.evaluate import headline_score
from sidetune.fleet import Fleet
from sidetune.job import Job, union
from sidetune.recipe import Recipe
from sidetune.side_fit import mean_outputs, new_member
from sidetune.tasks import Regress, Task, build_task

Rows = NDArray[np.int64]
On = Literal["val", "folds"]
TIE = 1e-4  # a hundredth of a percentage point: less than one image more or less in any set below 10,000


@dataclass(frozen=True)
class Score:
    """How good a trial is at a rung.

    Args:
        headline: the task's headline score, or the metric asked for, which the choice follows; None where
            it is not defined.
        loss: mean log loss, or squared error in standard deviations; it orders what scores the same.
    """

    headline: float | None
    loss: float

    @property
    def value(self) -> float:
        """The one number that is maximised: ``headline - 1e-4 loss / (1 + loss)``.

        The headline score is what is reported of the winner, so it is what the choice follows. Of a few
        hundred images it takes few values and many trials tie, hence the loss, which can outweigh a
        hundredth of a point at most. The loss alone would choose by calibration, which the winner's
        temperature mends afterwards.
        """
        return (0.0 if self.headline is None else self.headline) - TIE * self.loss / (1.0 + self.loss)

    def to_json(self) -> list[float | None]:
        """As a line of the journal holds it."""
        return [self.headline, self.loss]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Score:
        """The inverse of `to_json`."""
        return cls(values[0], values[1])


@dataclass(frozen=True)
class Fold:
    """Rows that a member trains on, and rows that it is scored on."""

    train: Rows
    held: Rows


@dataclass(frozen=True, eq=False)
class Choosing:
    """What all trials of a sweep are chosen on.

    Args:
        job: data, task, and the rows of each split.
        on: held-out folds, or the validation split.
        folds: one a member of a trial; their held rows are disjoint.
        metric: that the choice follows; None: the task's headline score.
    """

    job: Job
    on: On
    folds: tuple[Fold, ...]
    metric: str | None = None

    @classmethod
    def build(cls, job: Job, on: On, folds: int | str, *, metric: str | None = None) -> Choosing:
        """The folds: drawn, stratified, groups whole, by the data's split seed; or the ``column`` of a CSV.

        Raises:
            DataError: there are too few samples, groups, or samples of a class.
        """
        if on == "val":
            return cls(job, on, (Fold(job.split["train"], job.split["val"]),), metric)
        rows = union([job.split["train"], job.split["val"]])
        if folds == "column":
            fold = given_folds(job.dataset, rows)
        else:
            assert isinstance(folds, int), "checked before anything runs"
            seed = job.recipe.data.split_seed
            fold = dataset_folds(job.dataset, rows, num_folds=folds, seed=seed)
        parts = tuple(Fold(rows[fold != number], rows[fold == number]) for number in np.unique(fold))
        return cls(job, on, parts, metric)

    @property
    def trained(self) -> Rows:
        """Every row that a member trains on, ascending."""
        return union([fold.train for fold in self.folds])

    @property
    def held(self) -> Rows:
        """Every row that is scored, ascending."""
        return union([fold.held for fold in self.folds])

    def members(self, number: int, recipe: Recipe) -> list[Member]:
        """The members of a trial, one a fold."""
        return [
            new_member(self.job, recipe, name=name, rows=fold.train, task=self._task(recipe, fold))
            for name, fold in zip(self.names(number), self.folds, strict=True)
        ]

    def names(self, number: int) -> list[str]:
        """Names of a trial's members."""
        return [f"{number}.{fold}" for fold in range(len(self.folds))]

    def outputs(self, fleet: Fleet, recipes: dict[int, Recipe]) -> dict[int, Tensor]:
        """What trials say of the held rows: (n, K) a trial, in the coding of the job's task.

        Args:
            fleet: that trains them.
            recipes: of the trials by number.
        """
        parts: dict[int, list[Tensor]] = {number: [] for number in recipes}
        for index, fold in enumerate(self.folds):
            names = {number: self.names(number)[index] for number in recipes}
            found = mean_outputs(self.job, fleet, fold.held, list(names.values()))
            for number, recipe in recipes.items():
                task = self._task(recipe, fold)
                parts[number].append(recoded(task, self.job.task, found[names[number]]))
        return {number: self.in_order(some) for number, some in parts.items()}

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """What each fold says of its held rows, as (n, K) in the order of `held`."""
        order = np.argsort(np.concatenate([fold.held for fold in self.folds]), kind="stable")
        return torch.cat(list(parts))[torch.from_numpy(order)]

    def score(self, outputs: Tensor) -> Score | None:
        """Of outputs (n, K) of the held rows; None where they are not finite."""
        if not torch.isfinite(outputs).all():
            return None
        task = self.job.task
        predictions = task.predictions(outputs).double().numpy()
        headline = headline_score(task, predictions, self.job.dataset.targets[self.held], self.metric)
        target = self.job.targets[torch.from_numpy(self.held)]
        loss = plain(task).loss(outputs[None].double(), target).mean().item()
        return Score(headline, loss) if math.isfinite(loss) else None

    def _task(self, recipe: Recipe, fold: Fold) -> Task:
        return measured_task(self.job, recipe, fold.train)


def measured_task(job: Job, recipe: Recipe, rows: Rows) -> Task:
    """The task of a recipe, measured on these rows."""
    return build_task(recipe.data.task, job.dataset, rows, **recipe.data.task_options())


def recoded(given: Task, asked: Task, outputs: Tensor) -> Tensor:
    """Outputs in another task's coding: of a regression, whose units are measured on other rows."""
    if not isinstance(given, Regress) or not isinstance(asked, Regress):
        return outputs
    return (given.predictions(outputs) - outputs.new_tensor(asked.mean)) / outputs.new_tensor(asked.std)


def best(scores: Iterable[tuple[int, Score]]) -> int:
    """The number of the trial with the highest value; of equals the first."""
    return min(scores, key=lambda pair: (-pair[1].value, pair[0]))[0]

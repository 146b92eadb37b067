"""From what fits left to outcomes, and from there, when it is asked for, to test scores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.bench.accuracy.claims import Outcome
from sidetune.bench.accuracy.grid import Method
from sidetune.bench.accuracy.ground import Ground
from sidetune.bench.accuracy.ledger import Entry, count_looks, look
from sidetune.recipe import Recipe
from sidetune.tasks import Task

Table = Literal["grid", "time", "shots"]


@dataclass(frozen=True, eq=False)
class Answered:
    """An outcome, with what its scores will be computed from.

    Args:
        outcome: without test scores.
        table: that it is a row of.
        labels: gives the labels of its test images.
        test: digest of these images.
        outputs: (n, K) of each network that answered.
        frozen: digest of all that is frozen.
    """

    outcome: Outcome
    table: Table
    labels: Callable[[], NDArray[np.int64]]
    test: str
    outputs: tuple[Tensor, ...]
    frozen: str


@dataclass(frozen=True, eq=False)
class Answers:
    """What a method left on a task, in one table.

    Args:
        method: whose they are.
        recipe: frozen; None: it diverged wherever it was tried.
        entries: a network each.
        val: accuracy on what it was chosen by.
        cost: of one network.
        shots: images a class; None: all.
        over: whether it took more time than it was given.
    """

    method: Method
    recipe: Recipe | None
    entries: Sequence[Entry]
    val: float | None = None
    cost: Mapping[str, float] | None = None
    shots: int | None = None
    over: bool = False


def answered(
    ground: Ground, answers: Answers, table: Table, *, wanted: int, frozen: str
) -> Iterator[Answered]:
    """Rows of a method: one for the task's test images, one for each other data set.

    Args:
        ground: the task.
        answers: of the method.
        table: that they go into.
        wanted: seeds that all methods were asked for.
        frozen: digest of all that is frozen.
    """
    method, recipe, task = answers.method, answers.recipe, ground.job.task
    kept = [(seed, one) for seed, one in enumerate(answers.entries) if not one.diverged]
    once = bool(kept) and method.solved and answers.shots is None  # on all images a solution has no seed
    for name, images in ground.tests.items():
        own = name == "test"
        outcome = Outcome(
            ground.name if own else f"{ground.name} -> {name}",
            ground.folder.group if own else "",
            method.name,
            "" if recipe is None else recipe.hash,
            {} if recipe is None else _point(method, recipe),
            answers.val,
            (None,) if once else tuple(seed for seed, _ in kept),
            wanted,
            tuple(_hash(task, one.outputs[name]) for _, one in kept),
            answers.cost or {},
            suite=ground.folder.suite if own else "",
            shots=answers.shots,
            elsewhere=not own,
            over=answers.over,
            made=tuple({part: one.facts[part] for part in ("environment", "commit")} for _, one in kept),
        )
        outputs = tuple(one.outputs[name] for _, one in kept)
        yield Answered(outcome, table, images.labels(), images.digest, outputs, frozen)


def revealed(rows: Sequence[Answered], looks: Path) -> list[Answered]:
    """With test scores. Each look is written down first.

    Args:
        rows: of all tables.
        looks: file that they are counted in.
    """
    counts: dict[str, int] = {}
    for row in rows:
        task = row.outcome.task
        if task in counts:
            continue
        line = {
            "task": task,
            "test": row.test,
            "methods": sorted({one.outcome.method for one in rows if one.outcome.task == task}),
            "frozen": row.frozen,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        look(looks, line)
        counts[task] = count_looks(looks, row.test)
    return [
        replace(row, outcome=replace(row.outcome, right_SN=_right(row), looks=counts[row.outcome.task]))
        for row in rows
    ]


def _right(row: Answered) -> NDArray[np.bool_] | None:
    """(S, n): here, and nowhere else, are labels of test read."""
    if not row.outputs:
        return None
    targets = torch.from_numpy(row.labels())
    return torch.stack([output.argmax(1) == targets for output in row.outputs]).numpy()


def _point(method: Method, recipe: Recipe) -> dict[str, Any]:
    """What was chosen, for the table."""
    part = recipe.side.model_dump(mode="json") if method.solved else recipe.train.model_dump(mode="json")
    decay = "total_decay" if recipe.train.weight_decay is None else "weight_decay"
    names = ("l2", "pool", "taps") if method.solved else ("lr", decay, "epochs")
    share = {"ridge": recipe.head.ridge} if method.with_ridge else {}
    return {name: part[name] for name in names if name in part} | share


def _hash(task: Task, outputs: Tensor) -> str:
    """sha256 of test probabilities, float32."""
    predictions = np.ascontiguousarray(task.predictions(outputs).float().numpy())
    return hashlib.sha256(predictions.tobytes()).hexdigest()

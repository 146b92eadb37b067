"""The report: text tables of 80 columns, and one JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sidetune.bench.accuracy.claims import NO_CLAIM, Comparison, Outcome, compare
from sidetune.bench.accuracy.scoring import Table
from sidetune.bench.rows import Bench, Row, machine_lines
from sidetune.figures import duration, size

LINE = 80
NAME = 16  # columns of a method's name
CELL = 9  # of a score
MOST = (LINE - NAME) // CELL  # scores in a line
OVER = "†"
HEADS = {
    False: "Chosen from a grid of one size, trained to the end",
    True: "The same points at equal time of training",
}


@dataclass(frozen=True, eq=False)
class Report:
    """What was measured.

    Args:
        tables: outcomes, a method and a task each: of the ``grid``; at equal ``time`` and with few ``shots``,
            empty where they were not asked for.
        against: methods that all others are compared with.
        environment: plain JSON values.
    """

    tables: Mapping[Table, tuple[Outcome, ...]]
    against: tuple[str, ...]
    environment: Mapping[str, Any]

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Of the first table."""
        return self.tables["grid"]

    @property
    def timed(self) -> tuple[Outcome, ...]:
        """Of the second, at equal time."""
        return self.tables["time"]

    @property
    def shots(self) -> tuple[Outcome, ...]:
        """With few images a class."""
        return self.tables["shots"]

    @cached_property
    def comparisons(self) -> dict[bool, tuple[Comparison, ...]]:
        """Of both tables, the second's under True; none before test is revealed."""
        return {
            timed: tuple(
                comparison
                for against in self.against
                for method in names_of(outcomes)
                if method != against
                for comparison in compare(outcomes, method, against)
            )
            for timed, outcomes in ((False, self.outcomes), (True, self.timed))
        }

    @property
    def revealed(self) -> bool:
        """Whether test scores are in it."""
        return any(one.scores for one in self.outcomes)

    def bench(self) -> Bench:
        """The rows that every bench has, of both tables."""
        rows: list[Row] = []
        for outcomes, suffix in ((self.outcomes, ""), (self.timed, " at equal time")):
            rows += [row for one in outcomes for row in _rows(one, outcomes, self.against[:1], suffix)]
        for one in self.shots:
            rows += _rows(one, (), (), f", {one.shots} shots")
        return Bench(tuple(rows), self.environment)

    def to_json(self) -> dict[str, Any]:
        """``rows`` and ``environment`` as every bench; ``outcomes``, ``comparisons`` of both tables."""
        return {
            **self.bench().to_json(),
            "outcomes": [one.to_json() for one in self.outcomes],
            "timed_outcomes": [one.to_json() for one in self.timed],
            "shots_outcomes": [one.to_json() for one in self.shots],
            "comparisons": [one.to_json() for one in self.comparisons[False]],
            "timed_comparisons": [one.to_json() for one in self.comparisons[True]],
        }

    def lines(self) -> Iterator[str]:
        """The text: scores by group, means, costs, comparisons."""
        for timed, outcomes in ((False, self.outcomes), (True, self.timed)):
            if not outcomes:
                continue
            yield HEADS[timed]
            yield from _budgets(self.environment["setting"]) if timed else ()
            yield ""
            if self.revealed or not timed:  # before that the second table has no scores of its own
                for suite in dict.fromkeys(one.suite for one in outcomes):
                    inside = [one for one in outcomes if one.suite == suite]
                    for group in dict.fromkeys(one.group for one in inside):
                        yield from _scores([one for one in inside if one.group == group])
                    yield from _means(inside, suite)
            yield from _costs(outcomes)
            yield from _compared(self.comparisons[timed])
        if self.revealed and self.shots:
            yield from _curves(self.shots)
        yield from self._notes()
        yield from machine_lines(self.environment)

    def _notes(self) -> Iterator[str]:
        if any(one.short for one in (*self.outcomes, *self.timed)):
            yield "* fewer seeds than the others: nothing is claimed of it"
        if any(one.over for one in self.timed):
            yield f"{OVER} one epoch alone takes longer: it has one, and more time than the others"
        every = (one.claim for comparisons in self.comparisons.values() for one in comparisons)
        yield from dict.fromkeys(claim for claim in every if claim.startswith(NO_CLAIM))
        if any(one.solved for one in self.outcomes):
            yield "ridge is solved, its penalty chosen by leaving one out; linear by validation"
        if self.revealed:
            looks = {one.task: one.looks for one in self.outcomes}
            times = sorted(set(looks.values()))
            shown = f"{times[0]}" if len(times) == 1 else f"{times[0]} to {times[-1]}"
            looked = self.environment["setting"]["looks"]
            yield f"looks at these test scores so far, this one too: {shown} a task, as counted in"
            yield f"  {Path(looked).absolute()}"
        else:
            yield "Scores are of validation; nothing was compared with a label of test. Recipes are frozen."
            yield "Type: the same command with --reveal"
        yield ""


def means(outcomes: Sequence[Outcome], method: str) -> tuple[float | None, float | None]:
    """A method's mean over groups and over tasks; None where it lacks a task.

    Args:
        outcomes: of one table and one suite.
        method: its name.
    """
    mine = [one for one in outcomes if one.method == method and one.group]
    shown = [value(one) for one in mine]
    if not mine or any(score is None for score in shown):
        return None, None
    groups: dict[str, list[float]] = {}
    for one, score in zip(mine, shown, strict=True):
        groups.setdefault(one.group, []).append(score or 0.0)
    every = [score for scores in groups.values() for score in scores]
    return float(np.mean([np.mean(scores) for scores in groups.values()])), float(np.mean(every))


def value(one: Outcome) -> float | None:
    """The test score; before test is revealed, what it was chosen by."""
    return one.val if one.score is None else one.score


def names_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Of the methods, in their order."""
    return list(dict.fromkeys(one.method for one in outcomes))


def _rows(one: Outcome, outcomes: Sequence[Outcome], against: Sequence[str], suffix: str) -> Iterator[Row]:
    case = f"{one.task}/{one.method}{suffix}"
    if one.val is not None:
        yield Row(case, "val_accuracy", one.val, "share")
    if one.score is not None:
        row = Row(case, "test_accuracy", one.score, "share", spread=(min(one.scores), max(one.scores)))
        for other in outcomes:
            if other.task == one.task and other.method in against and other.score and other is not one:
                row = replace(
                    row, against=f"{other.task}/{other.method}{suffix}", ratio=one.score / other.score
                )
        yield row
    units = {"epoch_seconds": "s", "bytes": "B", "parameters": "1", "epochs": "1"}
    for name, amount in one.cost.items():
        yield Row(case, name, amount, units[name])


def _budgets(setting: Mapping[str, Any]) -> Iterator[str]:
    """A line a task: how long a training may take, and by what."""
    for task, budget in setting.get("equal_time", {}).items():
        by = budget["by"][:NAME]
        yield f"  {task[:18]}: {duration(budget['seconds'])}, by {by}, frozen by the first command"


def _scores(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Tasks of a group as columns, as many as a line holds."""
    tasks = list(dict.fromkeys(one.task for one in outcomes))
    at = {(one.task, one.method): one for one in outcomes}
    wide = max(CELL, *(min(len(task), 13) + 1 for task in tasks))
    per = (LINE - NAME) // wide
    for first in range(0, len(tasks), per):
        part = tasks[first : first + per]
        title = outcomes[0].group or "accuracy, %"
        yield f"{title:<{NAME}}" + "".join(f"{task[:13]:>{wide}}" for task in part)
        for name in names_of(outcomes):
            cells = [_cell(at[task, name]) if (task, name) in at else "" for task in part]
            yield f"{name[: NAME - 1]:<{NAME}}" + "".join(f"{cell:>{wide}}" for cell in cells)
        yield ""


def _cell(one: Outcome) -> str:
    shown = value(one)
    if not one.seeds:
        return "diverged"
    return ("–" if shown is None else f"{100 * shown:.1f}") + "*" * one.short + OVER * one.over


def _means(outcomes: Sequence[Outcome], suite: str) -> Iterator[str]:
    if len({one.task for one in outcomes if one.group}) < 2:
        return
    if suite:
        yield f"{suite}: {len({one.task for one in outcomes})} tasks"
    yield f"{'mean over':<{NAME}}{'groups':>{CELL}}{'tasks':>{CELL}}"
    for name in names_of(outcomes):
        shown = ["–" if mean is None else f"{100 * mean:.1f}" for mean in means(outcomes, name)]
        mark = "*" * any(one.short for one in outcomes if one.method == name)
        yield f"{name[: NAME - 1]:<{NAME}}" + "".join(f"{cell + mark:>{CELL}}" for cell in shown)
    yield ""


def _costs(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Of one network, the mean over tasks."""
    yield f"{'one network':<{NAME}}{'parameters':>12}{'epoch':>10}{'epochs':>8}{'training':>14}{'memory':>12}"
    for name in names_of(outcomes):
        costs = [one.cost for one in outcomes if one.method == name and one.cost]
        if not costs:
            continue
        mean = {key: float(np.mean([cost[key] for cost in costs])) for key in costs[0]}
        training = float(np.mean([cost["epoch_seconds"] * cost["epochs"] for cost in costs]))
        yield (
            f"{name[: NAME - 1]:<{NAME}}{mean['parameters']:>12,.0f}{mean['epoch_seconds']:>8.2f} s"
            f"{mean['epochs']:>8.0f}{duration(training):>14}{size(mean['bytes']):>12}"
        )
    yield ""


def _curves(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A table a task: methods down, images a class across."""
    yield "Trained on k images a class, drawn by each seed; nothing is chosen"
    yield ""
    counts = sorted({one.shots for one in outcomes if one.shots is not None})
    for task in dict.fromkeys(one.task for one in outcomes):
        at = {(one.method, one.shots): one for one in outcomes if one.task == task}
        yield f"{task[: NAME - 1]:<{NAME}}" + "".join(f"{f'k = {count}':>{CELL}}" for count in counts[:MOST])
        for name in names_of(outcomes):
            cells = [_cell(at[name, count]) if (name, count) in at else "" for count in counts[:MOST]]
            yield f"{name[: NAME - 1]:<{NAME}}" + "".join(f"{cell:>{CELL}}" for cell in cells)
        yield ""


def _compared(comparisons: Sequence[Comparison]) -> Iterator[str]:
    for pair in dict.fromkeys((one.method, one.against) for one in comparisons):
        yield f"{pair[0]} - {pair[1]}, points, 95 % over images and seeds"
        for one in comparisons:
            if (one.method, one.against) == pair:
                assert one.interval is not None
                low, high = (f"{100 * bound:+.1f}" for bound in one.interval)
                apart = f"{100 * one.value:+.1f} ({low} .. {high})"
                said = one.claim.partition(":")[0]
                yield f"  {one.where[:26]:<27}{apart:<22}{one.images:>7,} images  {said}"
        yield ""

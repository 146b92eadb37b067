"""What may be said of two methods: only what an interval carries.

    better          the lower 95 % bound of the difference is above 0
    worse           the upper one is below 0
    non-inferior    the lower one is above -1.0 point, on at least 10,000 test images
    undecided       anything else

Of a method with fewer seeds than the others nothing is claimed, nor of a trained one with fewer than three:
with one seed an interval is of images alone, and says nothing of the next seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidetune.evaluate import Interval
from sidetune.paired import middle, seeds_difference

MARGIN = 0.01  # a point of accuracy
LEAST_SEEDS = 3  # of what is trained: fewer say next to nothing of how far seeds are apart
LEAST_IMAGES = 10_000  # on fewer, an interval is about as wide as the margin
NO_CLAIM = "no claim"  # and why, after a colon
OVER_GROUPS, OVER_TASKS = "mean of groups", "mean of tasks"


@dataclass(frozen=True, eq=False)
class Outcome:
    """A method on a task.

    Args:
        task: its name.
        group: that it is averaged in; nothing: in none.
        method: its name.
        recipe: hash of what was frozen.
        point: what was chosen.
        val: accuracy on what it was chosen by; None where that is not known.
        seeds: of the networks that answered; none: it diverged. A solved method has the one seed None.
        wanted: how many seeds all methods were asked for.
        hashes: sha256 of each network's test probabilities, float32.
        cost: seconds of an epoch, epochs, bytes, parameters; nothing where it diverged.
        right_SN: whether the network of a seed is right about a test image; None before test is revealed.
        looks: how often the task's test scores were looked at, this time included.
        suite: whose groups are averaged together.
        shots: images a class that it was trained with; None: all.
        elsewhere: whether its images are of another data set than the task's.
        over: whether even one epoch takes longer than the time that it was given.
        made: environment and commit of each network's fit.
    """

    task: str
    group: str
    method: str
    recipe: str
    point: Mapping[str, Any]
    val: float | None
    seeds: tuple[int | None, ...]
    wanted: int
    hashes: tuple[str, ...]
    cost: Mapping[str, float] = field(default_factory=dict)
    right_SN: NDArray[np.bool_] | None = None
    looks: int = 0
    suite: str = ""
    shots: int | None = None
    elsewhere: bool = False
    over: bool = False
    made: tuple[Mapping[str, Any], ...] = ()

    @property
    def solved(self) -> bool:
        """Whether it has no seeds."""
        return self.seeds == (None,)

    @property
    def short(self) -> bool:
        """Whether it has fewer seeds than were asked for."""
        return not self.solved and len(self.seeds) < self.wanted

    @property
    def scores(self) -> tuple[float, ...]:
        """Test accuracy of each network; none before test is revealed."""
        return () if self.right_SN is None else tuple(self.right_SN.mean(1).tolist())

    @property
    def score(self) -> float | None:
        """Their mean."""
        return float(np.mean(self.scores)) if self.scores else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        fields = ("task", "group", "suite", "shots", "method", "recipe", "val", "wanted", "looks", "over")
        return {
            **{name: getattr(self, name) for name in fields},
            "point": dict(self.point),
            "seeds": list(self.seeds),
            "prediction_hashes": list(self.hashes),
            "cost": dict(self.cost),
            "made": [dict(one) for one in self.made],
            "test": None if self.score is None else list(self.scores),
        }


@dataclass(frozen=True)
class Comparison:
    """One method against another, on a task or on a mean over several.

    Args:
        where: the task, the group, or which mean.
        method: whose score comes first.
        against: whose is taken off.
        value: difference of accuracy.
        interval: 95 %, over images and seeds.
        images: test images in it.
        claim: what may be said.
    """

    where: str
    method: str
    against: str
    value: float
    interval: Interval
    images: int
    claim: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "interval": None if self.interval is None else list(self.interval)}


def claim(interval: tuple[float, float], images: int) -> str:
    """What an interval of a difference carries.

    Args:
        interval: 95 %.
        images: test images that it is over.
    """
    low, high = interval
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "non-inferior" if low > -MARGIN and images >= LEAST_IMAGES else "undecided"


def compare(outcomes: Sequence[Outcome], method: str, against: str) -> Iterator[Comparison]:
    """Every task, group and mean that both have; means only where both have all of it.

    Args:
        outcomes: of one table, revealed.
        method: its name.
        against: likewise.
    """
    ours, theirs = (
        {one.task: one for one in outcomes if one.method == name and one.scores} for name in (method, against)
    )
    parts: dict[str, _Part] = {}
    for task in ours:
        if task in theirs:
            parts[task] = _paired(ours[task], theirs[task])
            yield parts[task].comparison(task, method, against)
    for suite in dict.fromkeys(one.suite for one in outcomes):
        inside = {one.task: one.group for one in outcomes if one.suite == suite and one.group}
        for where, part in _means(inside, parts):
            yield part.comparison(f"{where}, {suite}" if suite else where, method, against)


@dataclass(frozen=True, eq=False)
class _Part:
    """A difference with its resamples, or a mean of some."""

    value: float
    resampled_R: NDArray[np.float64]
    images: int
    short: tuple[str, ...]

    def comparison(self, where: str, method: str, against: str) -> Comparison:
        interval = middle(self.resampled_R)
        said = f"{NO_CLAIM}: {self.short[0]}" if self.short else claim(interval, self.images)
        return Comparison(where, method, against, self.value, interval, self.images, said)


def _means(group_of: Mapping[str, str], parts: Mapping[str, _Part]) -> Iterator[tuple[str, _Part]]:
    """Means of a suite's tasks: over each group, over groups, over tasks."""
    groups: dict[str, list[str]] = {}
    for task, group in group_of.items():
        groups.setdefault(group, []).append(task)
    whole = {group: tasks for group, tasks in groups.items() if all(task in parts for task in tasks)}
    means = {group: _mean([parts[task] for task in tasks]) for group, tasks in whole.items()}
    yield from ((group, mean) for group, mean in means.items() if len(groups[group]) > 1)
    if len(groups) > 1 and len(means) == len(groups):
        yield OVER_GROUPS, _mean(list(means.values()))
        yield OVER_TASKS, _mean([parts[task] for task in group_of])


def _paired(ours: Outcome, theirs: Outcome) -> _Part:
    first, second = _alike(ours, theirs)
    seed = int(hashlib.sha256(ours.task.encode()).hexdigest()[:8], 16)  # tasks are drawn apart
    value, resampled_R = seeds_difference(first, second, seed=seed)
    short = tuple(text for one in (ours, theirs) if (text := _too_few(one)))
    return _Part(value, resampled_R, first.shape[1], short)


def _too_few(one: Outcome) -> str:
    """What a method lacks for a claim; nothing where it has enough seeds."""
    if one.short:
        return f"{one.method} has {len(one.seeds)} of {one.wanted} seeds"
    few = not one.solved and len(one.seeds) < LEAST_SEEDS
    return (
        f"{one.method} has {len(one.seeds)} seed{'s' * (len(one.seeds) > 1)}, not {LEAST_SEEDS}"
        if few
        else ""
    )


def _alike(ours: Outcome, theirs: Outcome) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of the seeds that both have; a solved method stands against each."""
    assert ours.right_SN is not None and theirs.right_SN is not None
    shared = [seed for seed in ours.seeds if seed in theirs.seeds]
    if ours.solved or theirs.solved or not shared:
        one = slice(None) if ours.solved or theirs.solved else slice(1)
        return ours.right_SN[one], theirs.right_SN[one]
    first, second = (
        right_SN[[seeds.index(seed) for seed in shared]]
        for right_SN, seeds in ((ours.right_SN, ours.seeds), (theirs.right_SN, theirs.seeds))
    )
    return first, second


def _mean(parts: Sequence[_Part]) -> _Part:
    return _Part(
        float(np.mean([part.value for part in parts])),
        np.mean([part.resampled_R for part in parts], 0),
        sum(part.images for part in parts),
        tuple(name for part in parts for name in part.short),
    )

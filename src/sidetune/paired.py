"""Two methods on the same samples: how much better one is, with an interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidetune.evaluate import Interval, draws
from sidetune.tasks import Task
from sidetune.weighted import WEIGHTED

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Headline score of one method minus that of another.

    Args:
        metric: the task's headline score.
        value: of all samples; None where the score is undefined.
        interval: 95 %, over samples; None where it is undefined in every resample.
    """

    metric: str
    value: float | None
    interval: Interval

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "metric": self.metric,
            "value": self.value,
            "interval": None if self.interval is None else list(self.interval),
        }


def paired_difference(
    task: Task,
    ours: NDArray[Any],
    theirs: NDArray[Any],
    targets: NDArray[Any],
    *,
    seed: int = 0,
) -> Difference:
    """How much better the headline score of `ours` is, with a paired percentile bootstrap interval.

    Both are scored on the same resampled samples, so what makes a resample easy or hard for both falls
    out of the difference: its interval is narrower than the two scores' own intervals suggest.

    Args:
        task: what the outputs mean.
        ours: (n, K) as `Task.predictions` gives them.
        theirs: the same of the other method, of the same samples.
        targets: classify (n,) class indices, else (n, K) with NaN where unlabelled.
        seed: of the draws.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 16.
    """
    assert ours.shape == theirs.shape and len(ours) == len(targets), (ours.shape, theirs.shape)
    score = WEIGHTED[task.kind][task.headline]
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)

    def differences(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return score(ours, targets, weights) - score(theirs, targets, weights)

    whole = float(differences(np.ones((len(targets), 1)))[0])
    parts = []
    for drawn in draws(len(targets), RESAMPLES, seed):
        counts = np.stack([np.bincount(row, minlength=len(targets)) for row in drawn], 1)
        parts.append(differences(np.ascontiguousarray(counts, np.float64)))
    values = np.concatenate(parts)
    defined = values[~np.isnan(values)]
    interval = None
    if len(defined):
        interval = middle(defined)
    return Difference(task.headline, None if np.isnan(whole) else whole, interval)


def seeds_difference(
    ours_SN: NDArray[Any], theirs_SN: NDArray[Any], *, seed: int = 0
) -> tuple[float, NDArray[np.float64]]:
    """How much better one method is on the mean over seeds and images, resampled over both.

    Images are paired, as in `paired_difference`; seeds are drawn again, too: with another seed either method
    would have scored otherwise. What has no seeds, a closed form, is one row and stands against each.

    S seeds that are drawn again S at a time vary less than S new ones would: what seeds add to the variance
    is understated by the factor (S - 1) / S. With three it is two thirds of what it should be; with one it is
    0, and the interval is of images alone.

    Args:
        ours_SN: 1 where the network of a seed is right about an image, else 0.
        theirs_SN: the same of the other method, of the same images.
        seed: of the draws.

    Returns:
        The difference of the means, and the same of each resample: (R,).

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 16.
    """
    seeds, num = max(len(ours_SN), len(theirs_SN)), ours_SN.shape[1]
    assert {len(ours_SN), len(theirs_SN)} <= {1, seeds}, (ours_SN.shape, theirs_SN.shape)
    apart_SN = np.asarray(ours_SN, np.float64) - np.asarray(theirs_SN, np.float64)
    rng = np.random.default_rng([seed, seeds])
    parts = []
    for drawn in draws(num, RESAMPLES, seed):
        counts_RN = np.stack([np.bincount(row, minlength=num) for row in drawn]).astype(np.float64)
        of_seeds_RS = counts_RN @ apart_SN.T / num
        chosen_RS = rng.integers(seeds, size=of_seeds_RS.shape)
        parts.append(np.take_along_axis(of_seeds_RS, chosen_RS, 1).mean(1))
    return float(apart_SN.mean()), np.concatenate(parts)


def middle(values: NDArray[np.float64]) -> tuple[float, float]:
    """Where 95 % of resampled values lie."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)

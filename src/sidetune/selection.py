"""Greedy ensemble selection: which members are averaged, and how often each counts.

    S_1 = {the member with the least loss},   S_{i+1} = S_i and the member with the least loss of

        mean over samples of loss(mean of S_i and p_m),   m again and again if it helps

The loss is of what the members answer together (`sidetune.ensemble.pooled`): log loss of the normalised mean
of log probabilities; for a regression the squared error of the mean number, over the standard deviation of
its target.

Source: Caruana et al., Ensemble Selection from Libraries of Models, ICML 2004, sections 2.1 and 2.2. As
there, the path goes on where a step does not pay, and the best point of it is kept: of a member that is
far better than another the second may help at a weight of 1/5 and harm at 1/2. Without bagging.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sidetune.errors import RequestError, SidetuneError
from sidetune.tasks import Regress, Task

MOST = 50  # members counted as often as they are in: weights are multiples of 1/50 and more
MARGIN = 1e-3  # of the loss: for less no member is added, as each has to be served
TIES = 1e-12  # of the loss: rounding
EPSILON = float(np.finfo(np.float64).eps)  # the least probability, as for `sidetune.weighted.log_losses`
BLOCK = 4_000_000  # probabilities whose logarithms are taken at a time: 32 MB

Array = NDArray[np.float64]


def select_greedily(
    predictions_MnK: NDArray[Any], targets: NDArray[Any], task: Task, *, most: int = MOST
) -> NDArray[np.int64]:
    """How often each member counts in the ensemble; its weight is its count over the sum of the counts.

    Deterministic; of equal members the first is taken. On these samples the ensemble is never worse than
    the best member.

    Args:
        predictions_MnK: of M members for n samples that none of them was trained on, as
            `Task.predictions` gives them.
        targets: classify (n,) class indices, else (n, K) with NaN where unlabelled.
        task: what the predictions mean.
        most: members in the ensemble at most, counted as often as they are in.

    Returns:
        (M,) counts, with a sum from 1 to `most`.

    Raises:
        SidetuneError: shapes do not fit, a prediction is not finite, or no sample has a label.
        RequestError: `most` is below 1.
    """
    if most < 1:
        raise RequestError(f"got at most {most} members in an ensemble; expected 1 or more")
    predictions_MnK, targets = np.asarray(predictions_MnK), np.asarray(targets)
    _check(predictions_MnK, targets, task)
    library = _library(predictions_MnK, targets, task)
    total_E = np.zeros(library.parts_ME.shape[1])
    chosen: list[int] = []
    path: list[float] = []
    for size in range(1, most + 1):
        losses_M = library.losses(total_E, size)
        least = float(losses_M.min())
        best = int(np.flatnonzero(losses_M <= least + TIES * abs(least))[0])
        chosen.append(best)
        path.append(float(losses_M[best]))
        total_E += library.parts_ME[best]
    kept = next(i for i, loss in enumerate(path) if loss <= min(path) * (1 + MARGIN))
    return np.bincount(chosen[: kept + 1], minlength=len(predictions_MnK)).astype(np.int64)


class _Library(Protocol):
    """Members, by what is averaged of each: E entries."""

    parts_ME: Array

    def losses(self, total_E: Array, size: int) -> Array:
        """(M,) mean loss of an ensemble of `size` whose others add up to `total_E`; inf: not the least."""


def _library(predictions_MnK: NDArray[Any], targets: NDArray[Any], task: Task) -> _Library:
    """Entries with a label, a sample's labelled ones of equal weight, 1 together; weights sum to 1."""
    if task.kind == "classify":
        return _Classes(predictions_MnK, targets)
    sample, output = np.nonzero(~np.isnan(targets))
    weight_E = 1.0 / np.bincount(sample, minlength=len(targets))[sample]
    weight_E /= weight_E.sum()
    truth_E = targets[sample, output].astype(np.float64)
    values_ME = predictions_MnK[:, sample, output].astype(np.float64)
    if isinstance(task, Regress):
        values_ME -= truth_E
        values_ME /= np.array(task.std)[output]
        return _SquaredErrors(values_ME, weight_E)
    sure_ME = values_ME.clip(EPSILON, 1 - EPSILON)
    return _YesOrNo((np.log(sure_ME) - np.log1p(-sure_ME)) * np.where(truth_E > 0.5, 1.0, -1.0), weight_E)


class _Classes:
    """Log loss of one of K classes: entries are log probabilities.

    Args:
        predictions_MnK: probabilities.
        targets: (n,) class indices.
    """

    def __init__(self, predictions_MnK: NDArray[Any], targets: NDArray[Any]) -> None:
        members, self.samples, self.classes = predictions_MnK.shape
        logs_MnK = np.log(predictions_MnK.astype(np.float64).clip(EPSILON, 1 - EPSILON))
        self.parts_ME = logs_MnK.reshape(members, -1)
        self.truth = np.arange(self.samples) * self.classes + targets
        self.mean_truth_M = self.parts_ME[:, self.truth].mean(1)

    def losses(self, total_E: Array, size: int) -> Array:
        """``mean over samples of log(sum over k of exp(mean_k)) - mean_truth``."""
        mean_truth_M = (total_E[self.truth].mean() + self.mean_truth_M) / size
        losses_M = np.empty(len(self.parts_ME))
        step = max(1, BLOCK // len(total_E))
        for first in range(0, len(losses_M), step):
            some = slice(first, first + step)
            mean_bE = (total_E + self.parts_ME[some]) / size
            sums_bn = np.exp(mean_bE).reshape(len(mean_bE), self.samples, self.classes).sum(2)
            losses_M[some] = np.log(sums_bn).mean(1) - mean_truth_M[some]
        return losses_M


class _YesOrNo:
    """Log loss of yes-or-no labels: entries are log odds of what is true.

    Args:
        parts_ME: log odds.
        weight_E: of each entry.
    """

    def __init__(self, parts_ME: Array, weight_E: Array) -> None:
        self.parts_ME, self.weight_E = parts_ME, weight_E

    def losses(self, total_E: Array, size: int) -> Array:
        """``w . log(1 + exp(-mean))``."""
        losses_M = np.empty(len(self.parts_ME))
        step = max(1, BLOCK // len(total_E))
        for first in range(0, len(losses_M), step):
            some = slice(first, first + step)
            losses_M[some] = np.logaddexp(0.0, -(total_E + self.parts_ME[some]) / size) @ self.weight_E
        return losses_M


class _SquaredErrors:
    """Squared error: entries are errors, each over the standard deviation of its target.

    Args:
        parts_ME: errors.
        weight_E: of each entry.
    """

    def __init__(self, parts_ME: Array, weight_E: Array) -> None:
        self.parts_ME, self.weight_E = parts_ME, weight_E
        self.squares_M = np.array([weight_E @ part_E**2 for part_E in parts_ME])

    def losses(self, total_E: Array, size: int) -> Array:
        """``w . (total + e_m)^2 / size^2``, multiplied out: one product for all members."""
        weighted_E = self.weight_E * total_E
        squares_M: Array = total_E @ weighted_E + 2 * self.parts_ME @ weighted_E + self.squares_M
        return squares_M.clip(min=0.0) / size**2  # below 0 by rounding alone


def _check(predictions_MnK: NDArray[Any], targets: NDArray[Any], task: Task) -> None:
    n, num_outputs = len(targets), task.num_outputs
    expected = (n,) if task.kind == "classify" else (n, num_outputs)
    if (
        predictions_MnK.ndim != 3
        or predictions_MnK.shape[1:] != (n, num_outputs)
        or targets.shape != expected
    ):
        raise SidetuneError(
            f"predictions have shape {predictions_MnK.shape} and targets {targets.shape}, expected "
            f"(M, n, K) = (M, {n}, {num_outputs}) and {expected}"
        )
    if not len(predictions_MnK) or not n:
        raise SidetuneError(
            f"got {len(predictions_MnK)} members and {n} samples, expected one of each at least"
        )
    for member, prediction_nK in enumerate(predictions_MnK):
        if not np.isfinite(prediction_nK).all():
            raise SidetuneError(f"predictions of member {member} are NaN or infinite. Leave it out")
    if task.kind == "classify":
        if targets.dtype.kind not in "iu" or targets.min() < 0 or targets.max() >= num_outputs:
            raise SidetuneError(
                f"targets are {targets.dtype} from {targets.min()} to {targets.max()}, expected class "
                f"indices from 0 to {num_outputs - 1}. Leave out samples without a label"
            )
    elif np.isnan(targets).all():
        raise SidetuneError("no sample has a label; expected some to select by")

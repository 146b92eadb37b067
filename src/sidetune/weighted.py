"""Scores under sample weights, many weightings at a time: what a bootstrap computes.

A resample with replacement is a weight a sample: how often it was drawn. So R resamples are one
matrix W (n, R), samples are sorted and grouped once for all of them, and every score below maps W to
R values. A score that a resample leaves undefined (an AUROC of one class) is NaN there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidetune.data.dataset import TaskKind

Array = NDArray[np.float64]
Targets = NDArray[Any]  # class indices (n,) int64, or (n, K) of numbers and NaN
Weighted = Callable[[Array, Targets, Array], Array]  # predictions (n, K), targets, W (n, R) -> (R,)


def weighted_accuracy(predictions: Array, targets: Targets, weights: Array) -> Array:
    """Weight of the samples whose largest probability is at the true class, over all weight: (R,)."""
    return _share(predictions.argmax(1) == targets, weights)


def weighted_balanced_accuracy(predictions: Array, targets: Targets, weights: Array) -> Array:
    """Mean over the classes with weight of the share of their weight that is predicted right: (R,)."""
    support = grouped(targets, weights, predictions.shape[1])
    hits = grouped(targets, weights * (predictions.argmax(1) == targets)[:, None], predictions.shape[1])
    return _mean_defined(_ratio(hits, support))


def weighted_macro_f1(predictions: Array, targets: Targets, weights: Array) -> Array:
    """Mean over the classes with weight of 2 hits / (support + predicted): (R,)."""
    guesses, num_classes = predictions.argmax(1), predictions.shape[1]
    support = grouped(targets, weights, num_classes)
    hits = grouped(targets, weights * (guesses == targets)[:, None], num_classes)
    f1 = _ratio(2 * hits, support + grouped(guesses, weights, num_classes))
    return _mean_defined(np.where(support > 0, f1, np.nan))


def weighted_macro_auroc(predictions: Array, targets: Targets, weights: Array) -> Array:
    """One-vs-rest AUROC, mean over the classes where it is defined; binary: of class 1. (R,)."""
    classes = [1] if predictions.shape[1] == 2 else np.unique(targets)
    values = [weighted_auroc(predictions[:, k], targets == k, weights) for k in classes]
    return _mean_defined(np.stack(values))


def weighted_log_loss(predictions: Array, targets: Targets, weights: Array) -> Array:
    """Mean of -log of the true class's probability, clipped as scikit-learn does: (R,)."""
    return _share(log_losses(predictions, targets), weights)


def weighted_top_calibration(predictions: Array, targets: Targets, weights: Array) -> Array:
    """Calibration error of the largest probability: (R,)."""
    correct = predictions.argmax(1) == targets
    return weighted_calibration_error(predictions.max(1), correct, weights)


def weighted_label_auroc(predictions: Array, targets: Targets, weights: Array) -> Array:
    """AUROC of each label over its labelled samples, mean over the labels where it is defined: (R,)."""
    return _mean_labels(weighted_auroc, predictions, targets, weights)


def weighted_label_precision(predictions: Array, targets: Targets, weights: Array) -> Array:
    """Average precision of each label, mean over the labels that have a positive: (R,)."""
    return _mean_labels(weighted_average_precision, predictions, targets, weights)


def weighted_label_f1(predictions: Array, targets: Targets, weights: Array) -> Array:
    """F1 of each label at 1/2, mean over the labels that have a positive: (R,)."""

    def f1(scores: Array, positive: NDArray[np.bool_], weights: Array) -> Array:
        support, predicted = positive @ weights, (scores > 0.5) @ weights
        value = _ratio(2 * ((scores > 0.5) & positive) @ weights, support + predicted)
        return np.where(support > 0, value, np.nan)

    return _mean_labels(f1, predictions, targets, weights)


def weighted_label_calibration(predictions: Array, targets: Targets, weights: Array) -> Array:
    """Calibration error of the labels' probabilities, all labelled entries pooled: (R,)."""
    sample, label = np.nonzero(~np.isnan(targets))
    return weighted_calibration_error(predictions[sample, label], targets[sample, label], weights[sample])


def weighted_r2(predictions: Array, targets: Targets, weights: Array) -> Array:
    """1 - squared error / squared distance from the mean, mean over the outputs: (R,)."""
    return _mean_outputs(_r2, predictions, targets, weights)


def weighted_mae(predictions: Array, targets: Targets, weights: Array) -> Array:
    """Mean absolute error, mean over the outputs: (R,)."""

    def mae(predicted: Array, target: Array, weights: Array) -> Array:
        return _share(np.abs(predicted - target), weights)

    return _mean_outputs(mae, predictions, targets, weights)


WEIGHTED: dict[TaskKind, dict[str, Weighted]] = {
    "classify": {
        "accuracy": weighted_accuracy,
        "balanced_accuracy": weighted_balanced_accuracy,
        "macro_f1": weighted_macro_f1,
        "auroc": weighted_macro_auroc,
        "log_loss": weighted_log_loss,
        "calibration_error": weighted_top_calibration,
    },
    "multilabel": {
        "auroc": weighted_label_auroc,
        "macro_f1": weighted_label_f1,
        "mean_average_precision": weighted_label_precision,
        "calibration_error": weighted_label_calibration,
    },
    "regress": {"r2": weighted_r2, "mae": weighted_mae},
}


def weighted_auroc(scores: Array, positive: NDArray[np.bool_], weights: Array) -> Array:
    """Area under the ROC curve by the Mann-Whitney statistic, ties counted half.

    Over all samples j, L_i = sum_j w_j ([s_j < s_i] + [s_j = s_i] / 2). The pairs of two positives
    add up to half the square of their weight P, whatever their order, hence

        AUROC = (sum over positives of w_i L_i - P^2 / 2) / (P * N)

    Args:
        scores: (n,).
        positive: (n,).
        weights: (n, R), 0 or more.

    Returns:
        (R,), NaN where one side has no weight.
    """
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order], positive[order]
    sums = np.zeros((len(scores) + 1, weights.shape[1]))
    np.cumsum(weights[order], axis=0, out=sums[1:])
    mine = ordered[positive]
    below, up_to = np.searchsorted(ordered, mine, "left"), np.searchsorted(ordered, mine, "right")
    own = weights[order[positive]]
    total = own.sum(0)
    pairs = (own * (sums[below] + sums[up_to])).sum(0) / 2 - total**2 / 2
    return _ratio(pairs, total * (sums[-1] - total))


def weighted_average_precision(scores: Array, positive: NDArray[np.bool_], weights: Array) -> Array:
    """Sum over thresholds of the recall gained there times the precision there: (R,).

    Args:
        scores: (n,). Equal scores share one threshold.
        positive: (n,).
        weights: (n, R), 0 or more.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    predicted = np.cumsum(weights[order], axis=0)[ends]
    hits = np.cumsum(weights[order] * positive[order, None], axis=0)[ends]
    gained = np.diff(hits, axis=0, prepend=0.0)
    precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
    return _ratio((gained * precision).sum(0), hits[-1])


def weighted_calibration_error(confidence: Array, correct: Targets, weights: Array, bins: int = 15) -> Array:
    """Sum over bins of |weight of the correct - sum of confidence|, over all weight: (R,).

    Args:
        confidence: (n,) in 0..1.
        correct: (n,) of 0 and 1.
        weights: (n, R), 0 or more.
        bins: equal width, closed below; the last one holds 1 too.
    """
    which = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = grouped(which, weights * (correct - confidence)[:, None], bins)
    return _ratio(np.abs(gaps).sum(0), weights.sum(0))


def log_losses(predictions: Array, targets: Targets) -> Array:
    """-log of the true class's probability, clipped to [eps, 1 - eps] of float64: (n,)."""
    probabilities = predictions / predictions.sum(1, keepdims=True)
    eps = np.finfo(np.float64).eps
    losses: Array = -np.log(np.clip(probabilities[np.arange(len(targets)), targets], eps, 1 - eps))
    return losses


def grouped(group: NDArray[np.int64], weights: Array, num_groups: int) -> Array:
    """Sums of the rows of each group: (num_groups, R)."""
    order = np.argsort(group, kind="stable")
    present, starts = np.unique(group[order], return_index=True)
    sums = np.zeros((num_groups, weights.shape[1]))
    sums[present] = np.add.reduceat(weights[order], starts, axis=0)
    return sums


def _r2(predicted: Array, target: Array, weights: Array) -> Array:
    target_centred = target - target.mean()  # so that the difference of squares below stays exact
    total = weights.sum(0)
    squares, sums = target_centred**2 @ weights, target_centred @ weights
    spread = squares - _ratio(sums**2, total)
    # A resample that holds one single value has a spread of 0 up to rounding: its R2 is undefined.
    defined = spread > 1e-12 * squares
    return np.where(defined, 1 - _ratio((target - predicted) ** 2 @ weights, spread), np.nan)


def _mean_labels(
    score: Callable[[Array, NDArray[np.bool_], Array], Array],
    predictions: Array,
    targets: Targets,
    weights: Array,
) -> Array:
    def one(predicted: Array, target: Array, weights: Array) -> Array:
        return score(predicted, target > 0.5, weights)

    return _mean_outputs(one, predictions, targets, weights)


def _mean_outputs(
    score: Callable[[Array, Array, Array], Array], predictions: Array, targets: Targets, weights: Array
) -> Array:
    """The mean over outputs, each over its labelled samples, of what is defined."""
    values = []
    for predicted, target in zip(predictions.T, targets.T.astype(np.float64), strict=True):
        labelled = ~np.isnan(target)
        if labelled.any():
            values.append(score(predicted[labelled], target[labelled], weights[labelled]))
    return _mean_defined(np.stack(values)) if values else np.full(weights.shape[1], np.nan)


def _mean_defined(values: Array) -> Array:
    """The mean over axis 0 of what is not NaN; NaN where all is."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(0), defined.sum(0))


def _share(values: NDArray[Any], weights: Array) -> Array:
    return _ratio(values @ weights, weights.sum(0))


def _ratio(top: NDArray[Any], bottom: NDArray[Any]) -> Array:
    """Top / bottom, NaN where the bottom is 0."""
    ratio: Array = np.divide(top, bottom, out=np.full(np.shape(bottom), np.nan), where=bottom != 0)
    return ratio

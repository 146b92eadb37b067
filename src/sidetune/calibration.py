"""Probabilities that mean what they say, and answers withheld where they say too little.

    p = softmax(output / T)      T fitted on validation; what is likeliest stays so

Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599), section 4.2.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray
from torch import Tensor

from sidetune.errors import SidetuneError
from sidetune.tasks import Regress, Task
from sidetune.weighted import weighted_calibration_error

BINS = 15  # of equal width, as in Guo et al.
LOG_TEMPERATURES = (-4.6, 3.0)  # 0.01 .. 20
PRIOR_STD = 0.5  # of log T: a dozen images that are all right would otherwise ask for T = 0
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)

Row = dict[str, Any]


def fit_temperature(
    task: Task, output: Tensor, target: Tensor, *, prior_std: float | None = PRIOR_STD
) -> float:
    """The temperature T with the least log loss of ``output / T``; 1 for a regression.

    ``mean loss + (log T)^2 / (2 prior_std^2 n)`` is minimised: log T is drawn to 0 with the weight of
    one sample's loss, which decides nothing once there are some dozens.

    Args:
        task: its loss, without class weights, label smoothing and focus, which would bend probabilities.
        output: (n, K) of samples that were not trained on.
        target: theirs, as the task takes them.
        prior_std: of log T; None: no prior.
    """
    if isinstance(task, Regress) or not len(output):
        return 1.0
    unbent = plain(task)
    pull = 0.0 if prior_std is None else 1.0 / (2.0 * prior_std**2 * len(output))

    def loss(log_temperature: float) -> float:
        scaled = output / math.exp(log_temperature)
        return unbent.loss(scaled[None], target).mean().item() + pull * log_temperature**2

    return math.exp(scipy.optimize.minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded").x)


def plain(task: Task) -> Task:
    """The task with the loss of its probabilities alone: nothing weighted, smoothed or focused."""
    if isinstance(task, Regress):
        return task
    unweighted: dict[str, Any] = {
        name: None
        for name in ("class_weights", "negative_weights", "positive_weights")
        if hasattr(task, name)
    }
    return replace(task, label_smoothing=0.0, focal_gamma=0.0, **unweighted)  # type: ignore[type-var]


def calibration_error(confidence: NDArray[Any], correct: NDArray[Any], bins: int = BINS) -> float:
    """Expected calibration error: ``sum over bins of |mean correct - mean confidence| * n_bin / n``.

    Args:
        confidence: (n,) probabilities.
        correct: (n,) 1 or True where what was predicted with that probability is the case.
        bins: of equal width over 0..1, closed below; the last one holds 1 too.

    Source: Naeini et al., AAAI 2015; Guo et al., ICML 2017 (arXiv 1706.04599), with 15 bins.
    """
    confidence, correct = _checked(confidence, correct)
    return float(weighted_calibration_error(confidence, correct, np.ones((len(correct), 1)), bins)[0])


def calibration_curve(confidence: NDArray[Any], correct: NDArray[Any], bins: int = BINS) -> list[Row]:
    """The bins behind the calibration error: low, high, count, mean confidence, accuracy; no empty ones.

    Args:
        confidence: (n,) probabilities.
        correct: (n,) 1 or True where what was predicted with that probability is the case.
        bins: as in `calibration_error`.
    """
    confidence, correct = _checked(confidence, correct)
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    return [
        {
            "low": int(k) / bins,
            "high": (int(k) + 1) / bins,
            "count": int((index == k).sum()),
            "confidence": float(confidence[index == k].mean()),
            "accuracy": float(correct[index == k].mean()),
        }
        for k in np.unique(index)
    ]


def answered(confidence: NDArray[Any], correct: NDArray[Any]) -> list[Row]:
    """What is left where answers below a threshold are withheld: the share answered, how often right.

    Args:
        confidence: (n,) probability of the likeliest class.
        correct: (n,) 1 or True where that class is the true one.
    """
    confidence, correct = _checked(confidence, correct)
    rows: list[Row] = []
    for threshold in THRESHOLDS:
        given = confidence >= threshold
        accuracy = float(correct[given].mean()) if given.any() else None
        rows.append({"threshold": threshold, "share": float(given.mean()), "accuracy": accuracy})
    return rows


def _checked(
    confidence: NDArray[Any], correct: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise SidetuneError(
            f"confidence has shape {confidence.shape} and correct {correct.shape}, expected one (n,) for both"
        )
    return confidence, correct

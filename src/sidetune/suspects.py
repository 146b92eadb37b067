"""Suspect labels: training samples whose label ridge, fitted on all the others, contradicts.

    classify     p(another class) reaches that class's own mean confidence, and exceeds p(label)
    multilabel   the same for each label's yes and no
    regress      left-out residual more than 4 robust standard deviations from the median

Source: confident learning, Northcutt et al., JAIR 2021 (arXiv 1911.00068), section 3.1, with ridge's
leave-one-out (leave-one-group-out) fits as the out-of-sample probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidetune.tasks import Regress, Task

ROBUST_LIMIT = 4.0
MAD_TO_STD = 1.4826  # of a normal distribution

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Suspect:
    """A label that the others contradict.

    Args:
        sample: position among the training samples that were given.
        output: the label or column that is meant; classify: of the label's class.
        label: as given: class index, 0 or 1, or the number.
        suggested: what the others say instead, likewise.
        p_label: probability of the label as given; None for a regression.
        p_suggested: of what is suggested; None for a regression.
        doubt: what they are sorted by.
    """

    sample: int
    output: int
    label: float
    suggested: float
    p_label: float | None
    p_suggested: float | None
    doubt: float


def find_suspects(task: Task, left_out: NDArray[Any], targets: NDArray[Any]) -> list[Suspect]:
    """Suspect labels, the most suspect first.

    Args:
        task: what the predictions mean.
        left_out: (n, K) predictions of each training sample by a fit of all the others.
        targets: classify (n,) class indices, else (n, K) with NaN where unlabelled.
    """
    predictions = np.asarray(left_out, np.float64)
    if task.kind == "classify":
        found = _classes(predictions, targets)
    elif isinstance(task, Regress):
        found = _numbers(predictions, targets, np.asarray(task.std))
    else:
        found = [
            Suspect(one.sample, k, one.label, one.suggested, one.p_label, one.p_suggested, one.doubt)
            for k in range(task.num_outputs)
            for one in _label(predictions[:, k], targets[:, k])
        ]
    return sorted(found, key=lambda one: (-one.doubt, one.sample, one.output))


def _classes(probabilities: Array, labels: NDArray[np.int64]) -> list[Suspect]:
    own = probabilities[np.arange(len(labels)), labels]
    present = np.bincount(labels, minlength=probabilities.shape[1])
    threshold = np.bincount(labels, weights=own, minlength=len(present)) / np.maximum(present, 1)
    confident = np.where((probabilities >= threshold) & (present > 0), probabilities, -1.0)
    suggested = confident.argmax(1)
    at = np.arange(len(labels))
    suspect = (suggested != labels) & (confident[at, suggested] > own)
    return [
        Suspect(
            row,
            int(labels[row]),
            int(labels[row]),
            int(suggested[row]),
            float(own[row]),
            float(probabilities[row, suggested[row]]),
            float(probabilities[row, suggested[row]] - own[row]),
        )
        for row in np.flatnonzero(suspect).tolist()
    ]


def _label(yes: Array, target: Array) -> list[Suspect]:
    """One yes-or-no label: two classes over the samples that have it."""
    rows = np.flatnonzero(~np.isnan(target))
    found = _classes(np.stack([1 - yes[rows], yes[rows]], 1), target[rows].astype(np.int64))
    return [
        Suspect(
            int(rows[one.sample]),
            one.output,
            one.label,
            one.suggested,
            one.p_label,
            one.p_suggested,
            one.doubt,
        )
        for one in found
    ]


def _numbers(predictions: Array, targets: Array, std: Array) -> list[Suspect]:
    residuals = (targets - predictions) / std
    centre = np.nanmedian(residuals, 0)
    spread = MAD_TO_STD * np.nanmedian(np.abs(residuals - centre), 0)
    doubt = np.abs(residuals - centre) / np.maximum(spread, 1e-9)
    return [
        Suspect(row, k, float(targets[row, k]), float(predictions[row, k]), None, None, float(doubt[row, k]))
        for row, k in np.argwhere(doubt > ROBUST_LIMIT).tolist()
    ]

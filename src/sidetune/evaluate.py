"""Scores of predictions: the numbers, their intervals, and the tables behind them.

Scores come from scikit-learn; calibration and the bootstrap are ours. A class or label that
a split lacks is left out of every mean over classes, so nothing is averaged that was not measured.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidetune.calibration import answered, calibration_curve, calibration_error
from sidetune.errors import RequestError, SidetuneError, nearest
from sidetune.tasks import Task
from sidetune.weighted import WEIGHTED, Array, Targets, log_losses

MOST_SORTED = 2_000_000  # classes times samples that are sorted anew for intervals: half a minute

Scores = dict[str, float | None]
Interval = tuple[float, float] | None
Row = dict[str, Any]


def evaluate(
    task: Task, predictions: NDArray[Any], targets: NDArray[Any], *, intervals: bool = True
) -> Evaluation:
    """Everything that is said about a split's predictions.

    Args:
        task: what the outputs mean.
        predictions: (n, K) as `Task.predictions` gives them.
        targets: classify (n,) class indices, else (n, K) with NaN where unlabelled.
        intervals: also bootstrap 95 % intervals, of every score but the calibration error, and but AUROC
            and average precision where K n is past 2 million: they sort n samples for each of K classes.

    Raises:
        SidetuneError: shapes do not fit, values are NaN, or there are no samples.
    """
    predictions, targets = _checked(task, predictions, targets)
    rows = per_class(task, predictions, targets)
    pair = _confidences(task, predictions, targets)
    return Evaluation(
        scores=_scores(task, predictions, targets, rows),
        intervals=bootstrap(task, predictions, targets, metrics=_resampled(task, len(targets)))
        if intervals
        else {},
        confusion=confusion(task, predictions, targets),
        per_class=tuple(rows),
        num_samples=len(targets),
        calibration=tuple(calibration_curve(*pair)) if pair else (),
        answered=tuple(answered(*pair)) if pair and task.kind == "classify" else (),
    )


def _resampled(task: Task, num_samples: int) -> list[str]:
    """The scores that get an interval."""
    slow = ("auroc", "mean_average_precision") if task.num_outputs * num_samples > MOST_SORTED else ()
    return [name for name in WEIGHTED[task.kind] if name not in ("calibration_error", *slow)]


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split.

    Args:
        scores: as `scores` returns them; None where undefined.
        intervals: 95 % interval (low, high) a score that has one; None where undefined.
        confusion: classify: (K, K) counts, a row a true class, a column a predicted one. Else None.
        per_class: one row a class, label or output, as `per_class` returns them.
        num_samples: n.
        calibration: classify, multilabel: the bins of the calibration curve.
        answered: classify: what is left where answers of little confidence are withheld.
    """

    scores: Scores
    intervals: dict[str, Interval]
    confusion: NDArray[np.int64] | None
    per_class: tuple[Row, ...]
    num_samples: int
    calibration: tuple[Row, ...] = ()
    answered: tuple[Row, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. The confusion matrix is a list of [true, predicted, count] that are not 0."""
        cells = None
        if self.confusion is not None:
            truth, guess = np.nonzero(self.confusion)
            cells = np.stack([truth, guess, self.confusion[truth, guess]], 1).tolist()
        return {
            "scores": dict(self.scores),
            "intervals": {name: list(pair) if pair else None for name, pair in self.intervals.items()},
            "confusion": cells,
            "per_class": [dict(row) for row in self.per_class],
            "num_samples": self.num_samples,
            "calibration": [dict(row) for row in self.calibration],
            "answered": [dict(row) for row in self.answered],
        }


def scores(task: Task, predictions: NDArray[Any], targets: NDArray[Any]) -> Scores:
    """Headline scores of a split, means over the classes, labels or outputs where they are defined.

    - classify: ``accuracy``; ``balanced_accuracy``, the mean recall, and ``macro_f1`` over the classes
      present in the targets; ``auroc``, one-vs-rest, mean over the classes present (two classes: of
      class 1); ``log_loss``; ``calibration_error`` of the largest probability.
    - multilabel: ``auroc`` over the labels that have both values; ``macro_f1`` (yes above 1/2) and
      ``mean_average_precision`` over the labels that have a positive; ``calibration_error`` of the
      probabilities, all labelled entries pooled.
    - regress: ``r2`` over the outputs whose targets vary; ``mae``, in the targets' units, over the
      labelled outputs.

    A score is None where nothing of it is defined: an AUROC of a single class, an R2 of a constant.

    Raises:
        SidetuneError: shapes do not fit, values are NaN, or there are no samples.
    """
    predictions, targets = _checked(task, predictions, targets)
    return _scores(task, predictions, targets, per_class(task, predictions, targets))


def headline_score(
    task: Task, predictions: NDArray[Any], targets: NDArray[Any], metric: str | None = None
) -> float | None:
    """The task's headline score alone: with 10,000 classes the table behind all of them takes minutes.

    Args:
        task: what the outputs mean.
        predictions: (n, K) as `Task.predictions` gives them.
        targets: classify (n,) class indices, else (n, K) with NaN where unlabelled.
        metric: another score instead.
    """
    score = WEIGHTED[task.kind][metric or task.headline]
    value = float(score(predictions, targets, np.ones((len(targets), 1)))[0])
    return None if np.isnan(value) else value


def _scores(task: Task, predictions: Array, targets: Targets, rows: list[Row]) -> Scores:
    if task.kind == "regress":
        return {"r2": _mean(rows, "r2"), "mae": _mean(rows, "mae")}
    pair = _confidences(task, predictions, targets)
    calibration = calibration_error(*pair) if pair else None
    if task.kind == "multilabel":
        positive = [row for row in rows if row["support"]]
        return {
            "auroc": _mean(rows, "auroc"),
            "macro_f1": _mean(positive, "f1"),
            "mean_average_precision": _mean(positive, "average_precision"),
            "calibration_error": calibration,
        }
    guesses = predictions.argmax(1)
    present = [row for row in rows if row["support"]]
    return {
        "accuracy": float(_sk().accuracy_score(targets, guesses)),
        "balanced_accuracy": _mean(present, "recall"),
        "macro_f1": _mean(present, "f1"),
        "auroc": rows[1]["auroc"] if task.num_outputs == 2 else _mean(rows, "auroc"),
        "log_loss": float(log_losses(predictions, targets).mean()),
        "calibration_error": calibration,
    }


def _confidences(task: Task, predictions: Array, targets: Targets) -> tuple[Array, Array] | None:
    """Probabilities and whether they came true: of the likeliest class, or of each labelled yes."""
    if task.kind == "regress":
        return None
    if task.kind == "classify":
        return predictions.max(1), (predictions.argmax(1) == targets).astype(np.float64)
    labelled = ~np.isnan(targets)
    return (predictions[labelled], targets[labelled]) if labelled.any() else None


def per_class(task: Task, predictions: NDArray[Any], targets: NDArray[Any]) -> list[Row]:
    """One row a class, label or output, in their order; None where a value is undefined.

    - classify: name, support (samples of that class), precision, recall, f1, auroc (one-vs-rest).
    - multilabel: the same and average_precision, over the labelled samples; support counts the ones.
    - regress: name, support (labelled samples), r2, mae in the target's units.

    Raises:
        SidetuneError: shapes do not fit, values are NaN, or there are no samples.
    """
    predictions, targets = _checked(task, predictions, targets)
    if task.kind == "classify":
        return _class_rows(task.outputs, predictions, targets)
    rows: list[Row] = []
    for k, name in enumerate(task.outputs):
        labelled = ~np.isnan(targets[:, k])
        target, predicted = targets[labelled, k].astype(np.float64), predictions[labelled, k]
        score = _regression if task.kind == "regress" else _label
        rows.append({"name": name, **score(target, predicted)})
    return rows


def confusion(task: Task, predictions: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.int64] | None:
    """Counts (K, K), a row a true class, a column a predicted one; None unless the task is classify."""
    predictions, targets = _checked(task, predictions, targets)
    if task.kind != "classify":
        return None
    matrix: NDArray[np.int64] = _sk().confusion_matrix(
        targets, predictions.argmax(1), labels=np.arange(task.num_outputs)
    )
    return matrix


def bootstrap(
    task: Task,
    predictions: NDArray[Any],
    targets: NDArray[Any],
    *,
    metrics: Iterable[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Percentile bootstrap intervals of scores, over samples.

    A resample in which a score is undefined does not count for that score; where it is undefined in
    all of them the interval is None.

    Args:
        task: what the outputs mean.
        predictions: (n, K) as `Task.predictions` gives them.
        targets: classify (n,) class indices, else (n, K) with NaN where unlabelled.
        metrics: names of `scores`. If None, all but ``calibration_error``: drawing samples twice adds
            scatter inside its bins, so that its interval comes out too high.
        resamples: R, how many.
        seed: of the draws.
        level: share of the resampled scores inside the interval.

    Raises:
        RequestError: an unknown metric, or no resamples, or a level outside 0..1.
        SidetuneError: shapes do not fit, values are NaN, or there are no samples.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    predictions, targets = _checked(task, predictions, targets)
    known = WEIGHTED[task.kind]
    names = [name for name in known if name != "calibration_error"] if metrics is None else list(metrics)
    for name in names:
        if name not in known:
            raise RequestError(f"no score {name!r} for {task.kind}.{nearest(name, known)}")
    if resamples < 1 or not 0 < level < 1:
        raise RequestError(
            f"got {resamples} resamples and level {level}, expected 1 or more, and 0 < level < 1"
        )
    values: dict[str, list[Array]] = {name: [] for name in names}
    for drawn in draws(len(targets), resamples, seed):
        weights = _counts(drawn)
        for name in names:
            values[name].append(known[name](predictions, targets, weights))
    return {name: _interval(np.concatenate(parts), level) for name, parts in values.items()}


def draws(num_samples: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """The drawn sample indices, (some, n) at a time, R rows in all."""
    rng = np.random.default_rng(seed)
    # 4 M weights at a time are 32 MB: that bounds the memory whatever n is.
    chunk = max(1, 4_000_000 // num_samples)
    for start in range(0, resamples, chunk):
        yield rng.integers(num_samples, size=(min(chunk, resamples - start), num_samples))


def _counts(drawn: NDArray[np.int64]) -> Array:
    """How often each sample was drawn: (n, some)."""
    num, num_samples = drawn.shape
    flat = (drawn + num_samples * np.arange(num)[:, None]).ravel()
    counts = np.bincount(flat, minlength=num * num_samples).reshape(num, num_samples)
    return np.ascontiguousarray(counts.T, np.float64)


def _interval(values: Array, level: float) -> Interval:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _class_rows(names: tuple[str, ...], predictions: Array, targets: NDArray[np.int64]) -> list[Row]:
    """One-vs-rest scores of each class."""
    values = _sk().precision_recall_fscore_support(
        targets, predictions.argmax(1), labels=np.arange(len(names)), zero_division=np.nan
    )
    rows = []
    for k, (name, *numbers, support) in enumerate(zip(names, *values, strict=True)):
        precision, recall, f1 = (None if np.isnan(number) else float(number) for number in numbers)
        row: Row = {"name": name, "support": int(support), "precision": precision, "recall": recall}
        rows.append({**row, "f1": f1, "auroc": _auroc(targets == k, predictions[:, k])})
    return rows


def _label(target: Array, predicted: Array) -> Row:
    """Scores of one yes-or-no label over its labelled samples, yes above 1/2."""
    truth, guess = target == 1, predicted > 0.5
    support = int(truth.sum())
    return {
        "support": support,
        "precision": float(_sk().precision_score(truth, guess)) if guess.any() else None,
        "recall": float(_sk().recall_score(truth, guess)) if support else None,
        "f1": float(_sk().f1_score(truth, guess)) if support or guess.any() else None,
        "auroc": _auroc(truth, predicted),
        "average_precision": float(_sk().average_precision_score(truth, predicted)) if support else None,
    }


def _auroc(truth: NDArray[np.bool_], predicted: Array) -> float | None:
    return float(_sk().roc_auc_score(truth, predicted)) if 0 < truth.sum() < len(truth) else None


def _regression(target: Array, predicted: Array) -> Row:
    varies = len(target) > 0 and target.min() < target.max()
    return {
        "support": len(target),
        "r2": float(_sk().r2_score(target, predicted)) if varies else None,
        "mae": float(_sk().mean_absolute_error(target, predicted)) if len(target) else None,
    }


def _sk() -> ModuleType:
    """Scikit-learn's metrics: 70 MB with what they bring, which extracting and answering do not need."""
    metrics: ModuleType = importlib.import_module("sklearn.metrics")
    return metrics


def _mean(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return float(np.mean(values)) if values else None


def _checked(task: Task, predictions: NDArray[Any], targets: NDArray[Any]) -> tuple[Array, Targets]:
    """Predictions (n, K) as float64 and targets, if they can be scored."""
    predictions, targets = np.asarray(predictions, np.float64), np.asarray(targets)
    if not targets.size:
        raise SidetuneError("there are no samples to score: the split is empty")
    shape = (len(targets), task.num_outputs)
    expected = shape[:1] if task.kind == "classify" else shape
    if predictions.shape != shape or targets.shape != expected:
        raise SidetuneError(
            f"predictions have shape {predictions.shape} and targets {targets.shape}, expected "
            f"(n, K) = {shape} and {expected}"
        )
    if not np.isfinite(predictions).all():
        num_bad = int((~np.isfinite(predictions)).any(1).sum())
        raise SidetuneError(
            f"predictions of {num_bad} of {len(predictions)} samples are NaN or infinite: the network "
            "diverged. Train with a lower learning rate"
        )
    _CHECKS[task.kind](predictions, targets)
    return predictions, targets


def _check_classify(predictions: Array, targets: Targets) -> None:
    if predictions.min() < 0 or not np.allclose(predictions.sum(1), 1.0, rtol=0, atol=1e-3):
        raise SidetuneError("predictions are not probabilities: no entry below 0, and rows that sum to 1")
    num_classes = predictions.shape[1]
    if targets.dtype.kind not in "iu" or targets.min() < 0 or targets.max() >= num_classes:
        raise SidetuneError(
            f"targets are {targets.dtype} from {targets.min()} to {targets.max()}, expected class indices "
            f"from 0 to {num_classes - 1}"
        )


def _check_multilabel(predictions: Array, targets: Targets) -> None:
    if predictions.min() < 0 or predictions.max() > 1:
        raise SidetuneError(
            f"predictions lie in {predictions.min():.4g} .. {predictions.max():.4g}, expected "
            "probabilities from 0 to 1"
        )
    if not (np.isnan(targets) | (targets == 0) | (targets == 1)).all():
        raise SidetuneError("targets hold other values than 0, 1 and NaN (unlabelled)")


def _check_regress(predictions: Array, targets: Targets) -> None:
    if np.isinf(targets).any():
        raise SidetuneError("targets hold infinite values, expected numbers, or NaN where unlabelled")


_CHECKS: dict[str, Callable[[Array, Targets], None]] = {
    "classify": _check_classify,
    "multilabel": _check_multilabel,
    "regress": _check_regress,
}

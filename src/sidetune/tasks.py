"""Tasks: what a network's K outputs mean, how they are trained, and how they are read.

    classify      one of K classes a sample      softmax cross-entropy
    multilabel    K yes-or-no labels a sample    sigmoid cross-entropy
    regress       K numbers a sample             squared error on standardised targets

Everything that a task measures (class weights, means, scales) comes from the training rows alone.
A task holds plain numbers, so it is written to an artifact as JSON. The head itself, a Linear(D, K),
belongs to the model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional

from sidetune.data.dataset import Dataset, TaskKind
from sidetune.errors import ArtifactError, DataError, RecipeError, first_complaint, nearest
from sidetune.focal import sigmoid_focus, softmax_focus

ClassWeights = Literal["none", "balanced"]
Floats = tuple[FiniteFloat, ...]
Array = NDArray[np.float64]


def build_task(
    kind: TaskKind,
    dataset: Dataset,
    train_rows: NDArray[np.int64],
    *,
    class_weights: ClassWeights = "none",
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> Task:
    """Measure a task on the training rows of a dataset.

    Args:
        kind: must be what the dataset's targets are.
        dataset: targets and output names.
        train_rows: indices of the training samples; no other target is looked at.
        class_weights: ``balanced`` gives every class (multilabel: both values of every label) the same
            sum of weights, with a mean weight of 1 over the training samples. A class that the
            training rows lack keeps weight 1.
        label_smoothing: in [0, 1). Classify: the share of the target spread over all K classes.
            Multilabel: targets are pulled towards 1/2.
        focal_gamma: 0 or more; above 0 what is right already counts less, see `sidetune.focal`.

    Raises:
        DataError: the dataset is of another kind, or the training rows cannot train an output.
        RecipeError: an option is out of range or means nothing for regression.
    """
    if kind != dataset.task:
        raise DataError(f"the data's targets are for {dataset.task}, not {kind}. Type: --task {dataset.task}")
    if class_weights not in ("none", "balanced"):
        raise RecipeError(
            f"class_weights is {class_weights!r}.{nearest(class_weights, ('none', 'balanced'))}"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise RecipeError(f"label_smoothing is {label_smoothing}, expected 0 or more and below 1")
    if not 0.0 <= focal_gamma < math.inf:
        raise RecipeError(f"focal_gamma is {focal_gamma}, expected 0 or more")
    if len(train_rows) == 0:
        raise DataError("there are no training samples to measure the task on")
    targets = dataset.targets[train_rows]
    balanced = class_weights == "balanced"
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "focal_gamma": focal_gamma}
    if kind == "classify":
        return replace(_measure_classify(targets, dataset.outputs, balanced), **options)
    _check_labelled(targets, dataset.outputs)
    if kind == "multilabel":
        return replace(_measure_multilabel(targets, dataset.outputs, balanced), **options)
    if balanced or label_smoothing or focal_gamma:
        raise RecipeError(
            f"class_weights={class_weights!r}, label_smoothing={label_smoothing}, focal_gamma={focal_gamma}: "
            "a regression has no classes. Leave them at their defaults"
        )
    return _measure_regress(targets, dataset.outputs)


class Task(ABC):
    """What K outputs mean. Not instantiated: `build_task` and `from_json` give a concrete task."""

    kind: ClassVar[TaskKind]
    headline: ClassVar[str]  # the score that choices on validation follow; higher is better
    outputs: tuple[str, ...]

    @property
    def num_outputs(self) -> int:
        """K: the width of the head's output."""
        return len(self.outputs)

    @property
    @abstractmethod
    def target_mean(self) -> Tensor:
        """Mean over the training rows of the targets as the output codes them: (K,) float64.

        Added to what was fitted on `centred_targets`, it gives an output that `predictions` can read.
        """

    @abstractmethod
    def centred_targets(self, target: Tensor) -> Tensor:
        """Targets for a closed-form fit, as the output codes them, minus `target_mean`.

        An unlabelled entry (NaN) becomes 0, which is the training mean.

        Args:
            target: classify (n,) int64, else (n, K) with NaN where unlabelled.

        Returns:
            (n, K) float64.
        """

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss a member and sample. 16-bit outputs are widened to float32 first.

        Args:
            output: (M, B, K), straight from the head.
            target: classify (B,) int64, else (B, K) with NaN where unlabelled. Over K the mean is
                taken of the labelled entries; a sample with none gives 0 and no gradient.

        Returns:
            (M, B), in the dtype of the output.
        """

    @abstractmethod
    def predictions(self, output: Tensor) -> Tensor:
        """Outputs (.., K) of the head -> probabilities, or numbers in the target's units: (.., K)."""

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for artifacts."""
        values = asdict(cast(Any, self))
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        if plain.get("focal_gamma") == 0:
            plain.pop("focal_gamma")  # it came later: what was written before, and by others, has none
        return {"kind": self.kind, **plain}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Task:
        """The inverse of `to_json`.

        Raises:
            ArtifactError: the kind is unknown, or fields are missing or too many.
        """
        kind = str(values.get("kind"))
        if kind not in TASKS:
            raise ArtifactError(f"the task's kind is {kind!r}.{nearest(kind, TASKS)}")
        expected = {"kind", *(field.name for field in fields(cast(Any, TASKS[kind])))}
        if set(values) | (expected & {"focal_gamma"}) != expected:
            raise ArtifactError(f"the task has fields {sorted(values)}, expected {sorted(expected)}")
        plain = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if name != "kind"
        }
        try:
            task: Task = TypeAdapter(TASKS[kind]).validate_python(plain)
        except ValidationError as error:
            raise ArtifactError(f"the task's {first_complaint(error)}") from error
        for name, value in plain.items():
            if isinstance(value, tuple) and len(value) != task.num_outputs:
                raise ArtifactError(f"the task has {len(value)} {name}, expected {task.num_outputs}")
        return task


@dataclass(frozen=True)
class Classify(Task):
    """One of K classes: softmax cross-entropy.

    A class weight multiplies the whole loss of its samples. (torch's own ``weight`` differs when
    there is label smoothing too: it weights each smoothed term by that term's class.)

    Args:
        outputs: class names.
        shares: of each class among the training samples.
        class_weights: one a class, or None.
        label_smoothing: share of the target spread over all classes.
        focal_gamma: multiplies the loss by (1 - p_t)^gamma, p_t of the true class also where it is smoothed.
    """

    kind: ClassVar[TaskKind] = "classify"
    headline: ClassVar[str] = "balanced_accuracy"
    outputs: tuple[str, ...]
    shares: Floats
    class_weights: Floats | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    @property
    def target_mean(self) -> Tensor:
        """Shares of the classes: the mean of the one-hot targets, (K,) float64."""
        return torch.tensor(self.shares, dtype=torch.float64)

    def centred_targets(self, target: Tensor) -> Tensor:
        """One-hot minus the shares of the classes: (n, K) float64."""
        mean = self.target_mean.to(target.device)
        return functional.one_hot(target, self.num_outputs).to(torch.float64) - mean

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """``-sum_k t_k log softmax(output)_k``, times the target's focus and class weight: (M, B)."""
        output = _widened(output)
        assert output.shape[1:] == (len(target), self.num_outputs), (output.shape, target.shape)
        loss = functional.cross_entropy(
            output.flatten(0, 1),
            target.expand(output.shape[:2]).flatten(),
            reduction="none",
            label_smoothing=self.label_smoothing,
        ).view(output.shape[:2])
        if self.focal_gamma:
            loss = loss * softmax_focus(output, target, self.focal_gamma)
        if self.class_weights is None:
            return loss
        return loss * output.new_tensor(self.class_weights)[target]

    def predictions(self, output: Tensor) -> Tensor:
        """Softmax probabilities (.., K)."""
        return _widened(output).softmax(-1)


@dataclass(frozen=True)
class MultiLabel(Task):
    """K yes-or-no labels: sigmoid cross-entropy, mean over the labelled entries of a sample.

    For a closed-form fit a label is coded -1/2 or 1/2, so that an output above 0, which is a
    probability above 1/2, means yes.

    Args:
        outputs: label names.
        shares: of ones among the labelled training samples, one a label.
        negative_weights: weight of a 0, one a label, or None.
        positive_weights: weight of a 1, one a label, or None.
        label_smoothing: s pulls targets t to (1 - s) t + s / 2.
        focal_gamma: multiplies a label's loss by (1 - p_t)^gamma, p_t of its value before it is smoothed.
    """

    kind: ClassVar[TaskKind] = "multilabel"
    headline: ClassVar[str] = "auroc"
    outputs: tuple[str, ...]
    shares: Floats
    negative_weights: Floats | None = None
    positive_weights: Floats | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    @property
    def target_mean(self) -> Tensor:
        """Share of ones minus 1/2: the mean of targets coded -1/2 and 1/2, (K,) float64."""
        return torch.tensor(self.shares, dtype=torch.float64) - 0.5

    def centred_targets(self, target: Tensor) -> Tensor:
        """0 or 1 minus the share of ones; unlabelled entries become 0: (n, K) float64."""
        shares = torch.tensor(self.shares, dtype=torch.float64, device=target.device)
        return (target.to(torch.float64) - shares).nan_to_num(nan=0.0)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """``-t log p - (1 - t) log(1 - p)``, weighted, mean over the labelled entries: (M, B)."""
        output = _widened(output)
        assert output.shape[1:] == target.shape, (output.shape, target.shape)
        labelled = ~target.isnan()
        target = target.to(output.dtype).nan_to_num(nan=0.0)
        smoothed = (1 - self.label_smoothing) * target + self.label_smoothing / 2
        loss = functional.binary_cross_entropy_with_logits(
            output, smoothed.expand_as(output), reduction="none"
        )
        if self.focal_gamma:
            loss = loss * sigmoid_focus(output, target, self.focal_gamma)
        if self.negative_weights is not None and self.positive_weights is not None:
            negative, positive = map(output.new_tensor, (self.negative_weights, self.positive_weights))
            loss = loss * torch.where(target > 0.5, positive, negative)
        return _labelled_mean(loss, labelled)

    def predictions(self, output: Tensor) -> Tensor:
        """Probability (.., K) of each label, by the sigmoid."""
        return _widened(output).sigmoid()


@dataclass(frozen=True)
class Regress(Task):
    """K numbers: squared error on targets standardised by the training rows.

    Args:
        outputs: names of the target columns.
        mean: of each target over the labelled training samples, in its own units.
        std: population standard deviation, likewise.
    """

    kind: ClassVar[TaskKind] = "regress"
    headline: ClassVar[str] = "r2"
    outputs: tuple[str, ...]
    mean: Floats
    std: Floats

    @property
    def target_mean(self) -> Tensor:
        """Zeros (K,) float64: the output is standardised already."""
        return torch.zeros(self.num_outputs, dtype=torch.float64)

    def centred_targets(self, target: Tensor) -> Tensor:
        """(target - mean) / std; unlabelled entries become 0: (n, K) float64."""
        return self._standardised(target.to(torch.float64)).nan_to_num(nan=0.0)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """``(output - (target - mean) / std)^2``, mean over the labelled entries: (M, B)."""
        output = _widened(output)
        assert output.shape[1:] == target.shape, (output.shape, target.shape)
        labelled = ~target.isnan()
        standardised = self._standardised(target.to(output.dtype)).nan_to_num(nan=0.0)
        return _labelled_mean((output - standardised).square(), labelled)

    def predictions(self, output: Tensor) -> Tensor:
        """``output * std + mean``: (.., K) in the target's units."""
        output = _widened(output)
        return output * output.new_tensor(self.std) + output.new_tensor(self.mean)

    def _standardised(self, target: Tensor) -> Tensor:
        return (target - target.new_tensor(self.mean)) / target.new_tensor(self.std)


TASKS: dict[str, type[Task]] = {"classify": Classify, "multilabel": MultiLabel, "regress": Regress}


def _measure_classify(targets: NDArray[Any], outputs: tuple[str, ...], balanced: bool) -> Classify:
    counts = np.bincount(targets, minlength=len(outputs))
    weights = _numbers(_balanced(counts)) if balanced else None
    return Classify(outputs, _numbers(counts / len(targets)), weights)


def _measure_multilabel(targets: NDArray[Any], outputs: tuple[str, ...], balanced: bool) -> MultiLabel:
    counts = np.stack([(targets == 0).sum(0), (targets == 1).sum(0)])
    shares = _numbers(counts[1] / counts.sum(0))
    if not balanced:
        return MultiLabel(outputs, shares)
    weights = np.stack([_balanced(pair) for pair in counts.T], 1)
    return MultiLabel(outputs, shares, _numbers(weights[0]), _numbers(weights[1]))


def _measure_regress(targets: NDArray[Any], outputs: tuple[str, ...]) -> Regress:
    targets = targets.astype(np.float64)
    constant = [
        name
        for name, low, high in zip(outputs, np.nanmin(targets, 0), np.nanmax(targets, 0), strict=True)
        if low == high
    ]
    if constant:
        raise DataError(
            f"outputs {constant} have one single value in the training rows: there is nothing to learn. "
            "Leave them out of --labels"
        )
    return Regress(outputs, _numbers(np.nanmean(targets, 0)), _numbers(np.nanstd(targets, 0)))


def _check_labelled(targets: NDArray[Any], outputs: tuple[str, ...]) -> None:
    unlabelled = [
        name for name, missing in zip(outputs, np.isnan(targets).all(0), strict=True) if bool(missing)
    ]
    if unlabelled:
        raise DataError(
            f"outputs {unlabelled} have no labelled training sample. Leave them out of --labels, "
            "or label some training rows"
        )


def _balanced(counts: NDArray[np.int64]) -> Array:
    """Weights w with equal ``w * counts`` over the classes present, and mean 1 over samples."""
    present = counts > 0
    return np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 1.0)


def _labelled_mean(loss_MBK: Tensor, labelled_BK: Tensor) -> Tensor:
    """Mean over the labelled entries of K; 0 where there are none: (M, B)."""
    total = torch.where(labelled_BK, loss_MBK, loss_MBK.new_zeros(())).sum(-1)
    return total / labelled_BK.sum(-1).clamp(min=1)


def _widened(output: Tensor) -> Tensor:
    """Float32 instead of 16-bit floats: exponentials and sums lose too much there."""
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def _numbers(values: NDArray[Any]) -> Floats:
    return tuple(float(value) for value in values)

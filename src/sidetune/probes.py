"""Ridge and the linear probe on one run's features: solved from pooled taps, in seconds.

Every fit of a side network answers with these first. They are solved to the end (closed form, or
L-BFGS to convergence), so that a side network that beats them beats something.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.calibration import fit_temperature
from sidetune.errors import DivergedError
from sidetune.evaluate import headline_score
from sidetune.features import FinalNorm
from sidetune.model import NormKind, SideModel
from sidetune.sides.base import Pool
from sidetune.sides.linear import PENALTIES, Coordinates, Linear, LinearRecipe, LinearSolution, solve_linear
from sidetune.sides.ridge import LAMBDAS, Ridge, RidgeRecipe, solve_ridge
from sidetune.summary import Summary
from sidetune.tasks import Task


@dataclass(frozen=True)
class Pooled:
    """What probes are fitted on: pooled taps with targets and splits.

    Args:
        summary: of every row of the dataset.
        targets: of every row, as the task takes them.
        train: rows to fit on.
        val: rows that choose the linear probe's pool and penalty.
        groups: of every row; ridge leaves out whole groups. None where there are none.
    """

    summary: Summary
    targets: Tensor
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    groups: NDArray[np.str_] | None = None


@dataclass(frozen=True)
class Probe:
    """A solved probe.

    Args:
        model: ready to predict.
        recipe: with what was chosen filled in.
        detail: what was chosen and how well it converged, for the tables.
        left_out: ridge: outputs (n, K) of the training rows, each fitted on all the others.
    """

    model: SideModel
    recipe: RidgeRecipe | LinearRecipe
    detail: dict[str, Any]
    left_out: Tensor | None = None

    def outputs(self, summary: Summary, rows: NDArray[np.int64]) -> Tensor:
        """Outputs of rows straight from the summary: (n, K)."""
        side, part = self.model.side, summary.rows(torch.from_numpy(rows))
        assert isinstance(side, Ridge | Linear)
        pooled = (
            side.standardised(part)
            if isinstance(side, Ridge)
            else part.pooled(side.spec.last.name, side.pool)
        )
        with torch.no_grad():
            return self.model.outputs(pooled[None])[0]


def fit_ridge(recipe: RidgeRecipe, data: Pooled, task: Task, *, metric: str | None = None) -> Probe:
    """Ridge with lambda by leave-one-out on the training rows; validation is not looked at.

    Args:
        recipe: a lambda of its own leaves nothing to choose.
        data: what it is fitted on.
        task: measured on the training rows.
        metric: that lambda is chosen by; None: the task's headline score.
    """
    side = Ridge(data.summary.spec, taps=recipe.taps, statistics=recipe.statistics)
    train = data.summary.rows(torch.from_numpy(data.train))
    side.standardise(train)
    target = data.targets[data.train]

    def score(left_out: Tensor) -> float:
        return headline(task, (left_out + task.target_mean), target, metric)

    solution = solve_ridge(
        side.standardised(train),
        task.centred_targets(target),
        score,
        lambdas=LAMBDAS if recipe.l2 is None else (recipe.l2,),
        groups=None if data.groups is None else data.groups[data.train],
    )
    # Ridge fits zeros and ones, whose softmax says little: this makes probabilities of them.
    left_out = solution.left_out + task.target_mean
    sharpness = 1.0 / fit_temperature(task, left_out, target, prior_std=None)
    model = SideModel(side, task.num_outputs, norm="none")
    set_head(model, sharpness * solution.weight, sharpness * (solution.bias + task.target_mean))
    detail: dict[str, Any] = {
        "l2": solution.l2,
        "taps": len(side.chosen),
        "left_out": solution.scores[solution.l2],
    }
    if task.kind != "regress":
        detail["sharpness"] = sharpness
    detail |= _unused(task, "class_weights", "focal_gamma")
    return Probe(model, recipe.model_copy(update={"l2": solution.l2}), detail, sharpness * left_out)


def fit_linear(
    recipe: LinearRecipe,
    data: Pooled,
    task: Task,
    *,
    norm: NormKind,
    final_norm: FinalNorm | None,
    metric: str | None = None,
) -> Probe:
    """The linear probe by L-BFGS; validation chooses pool and penalty, of equals the lower loss.

    It is solved without focus: a focal loss has no single minimum.

    Args:
        recipe: a pool and a penalty of its own leave nothing to choose.
        data: what it is fitted on.
        task: measured on the training rows.
        norm: between pool and head; a trained one is the backbone's here.
        final_norm: the backbone's.
        metric: that pool and penalty are chosen by; None: the task's headline score.

    Raises:
        DivergedError: there is no solution at any penalty, or at the recipe's own.
    """
    unused = _unused(task, "focal_gamma")
    if unused:
        task = replace(task, focal_gamma=0.0)  # type: ignore[type-var]
    has_cls = data.summary.spec.last.cls_index is not None
    pools: tuple[Pool, ...] = ("cls", "mean", "cls+mean") if has_cls else ("mean",)
    if recipe.pool != "best":
        pools = (recipe.pool,)
    penalties = PENALTIES if recipe.l2 is None else (recipe.l2,)
    best: tuple[tuple[float, float], SideModel, LinearSolution, float] | None = None
    for pool in pools:
        # a norm has nothing to train in a probe: its trained affine would fold into the head
        model = SideModel(
            Linear(data.summary.spec, pool=pool),
            task.num_outputs,
            norm="backbone" if norm == "trained" else norm,
            final_norm=final_norm,
        )
        pooled = data.summary.pooled(data.summary.spec.last.name, pool)
        normed = model.norm(pooled[None])[0]
        coordinates, solution = Coordinates(normed[data.train]), None
        for l2 in penalties:
            try:
                solution = solve_linear(coordinates, data.targets[data.train], task, l2, start=solution)
            except DivergedError:
                if best is None or recipe.l2 is not None:
                    raise
                continue  # too weak a penalty for these features; stronger ones were solved
            output = normed[data.val].double() @ solution.weight + solution.bias
            loss = task.loss(output[None], data.targets[data.val]).mean().item()
            rank = (headline(task, output, data.targets[data.val], metric), -loss)
            if best is None or rank > best[0]:
                best = rank, model, solution, l2
    assert best is not None, "no pool or penalty was given"
    _, model, solution, l2 = best
    set_head(model, solution.weight, solution.bias)
    chosen = {"l2": l2, "pool": model.side.pool}
    detail = {**chosen, "iterations": solution.iterations, "gradient": solution.gradient, **unused}
    return Probe(model, recipe.model_copy(update=chosen), detail)


def _unused(task: Task, *names: str) -> dict[str, Any]:
    """What was asked for and a probe cannot do, for the tables."""
    return {name: "not used" for name in names if getattr(task, name, None)}


def headline(task: Task, output: Tensor, target: Tensor, metric: str | None = None) -> float:
    """The task's headline score of outputs (n, K), or another; -inf where it is not defined."""
    predictions = task.predictions(output).double().numpy()
    value = headline_score(task, predictions, target.numpy(), metric)
    return float("-inf") if value is None else value


def set_head(model: SideModel, weight: Tensor, bias: Tensor) -> None:
    """Put a solution (F, K), (K,) into a one-member model's head."""
    with torch.no_grad():
        model.head.weight_MDK.copy_(weight[None])
        model.head.bias_MK.copy_(bias[None])

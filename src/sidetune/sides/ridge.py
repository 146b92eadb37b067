"""Ridge regression in closed form: the opponent that every side network must beat.

    x = [cls, mean] of each chosen tap, standardised on the training split, / sqrt(F)   (F numbers)
        switch: their patch tokens' std, and means over a 2 x 2 grid, too
    Y = one-hot minus the training mean
    W = (X'X + lambda I)^-1 X'Y

lambda comes from 1e-5 .. 1e2 by the leave-one-out score (leave-one-group-out where samples have
groups), which needs no refit: with H the hat matrix, the left-out residual of a sample is
(y - Hy) / (1 - h_ii), of a group (I - H_gg)^-1 (y - Hy)_g. Solved through the smaller of the two
Gram matrices, in float64: seconds, no gradient, no validation data. Class weights have no part in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from sidetune.features import Features, Spec
from sidetune.keyed import Draws
from sidetune.sides.base import Side, SideRecipe
from sidetune.summary import Statistic, Summary, summarise
from sidetune.threads import SMALL, one_thread

Statistics = Literal["cls+mean", "cls+mean+std", "cls+mean+quadrants", "cls+mean+std+quadrants"]
LAMBDAS = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 5))  # 1e-5 .. 1e2


class RidgeRecipe(SideRecipe):
    """Ridge's dials.

    Args:
        taps: ``all``, ``last``, or a list of names.
        statistics: of each tap: class token and ``mean`` of the patch tokens; their ``std`` a channel;
            their means over 2 x 2 ``quadrants``. More than the first read the features themselves, once.
        l2: lambda; None: chosen by leave-one-out.
    """

    name: Literal["ridge"] = "ridge"
    taps: Literal["all", "last"] | tuple[str, ...] = "all"
    statistics: Statistics = "cls+mean"
    l2: float | None = Field(None, gt=0)


class Ridge(Side):
    """Standardised [cls, mean] of the chosen taps. Parameters: 0; the head holds W.

    Args:
        spec: the taps of the features it will be given.
        taps: ``all``, ``last``, or tap names.
        statistics: see `RidgeRecipe`.
        members: 1.
    """

    centre: Tensor
    spread: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        taps: Literal["all", "last"] | tuple[str, ...] = "all",
        statistics: Statistics = "cls+mean",
        members: int = 1,
    ) -> None:
        super().__init__(spec, members=members, pool="mean")
        chosen = {"all": spec.names, "last": (spec.last.name,)}.get(taps) if isinstance(taps, str) else taps
        self.chosen = spec.select(chosen or ())
        self.more = beyond_pooled(statistics)
        self.register_buffer("centre", torch.zeros(self.width))
        self.register_buffer("spread", torch.ones(self.width))

    @property
    def width(self) -> int:
        """F: D a tap, 2D where it has a class token; D more for the std, 4D for the quadrants."""
        more = sum(4 if name == "quadrants" else 1 for name in self.more)
        return sum(tap.width * ((1 if tap.cls_index is None else 2) + more) for tap in self.chosen.taps)

    @property
    def halves(self) -> int:
        """The features are not normed in parts."""
        return 1

    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """b_L: (1, B, N, D)."""
        return self.scaled(features, self.spec.last.name)[None]

    def forward(self, features: Features, draws: Draws | None = None) -> Tensor:
        """(1, B, F), standardised."""
        return self.standardised(summarise(features.select(self.chosen.names), self.more))[None]

    def shares(self, features: Features) -> None:
        """None: every tap's class token and mean stand side by side."""
        return None

    def standardise(self, summary: Summary) -> None:
        """Measure mean and spread on the training split. A constant feature keeps spread 1."""
        x = self._raw(summary).double()
        spread = x.std(0, unbiased=False)
        spread[spread <= 1e-7 * x.abs().amax(0)] = 1.0
        self.centre.copy_(x.mean(0))
        self.spread.copy_(spread * self.width**0.5)

    def standardised(self, summary: Summary) -> Tensor:
        """Features as the solver sees them: (n, F)."""
        raw = self._raw(summary)
        return (raw - self.centre.to(raw.dtype)) / self.spread.to(raw.dtype)

    def _raw(self, summary: Summary) -> Tensor:
        parts = [summary.pooled(name, "cls+mean") for name in self.chosen.names]
        at = [summary.spec.index(name) for name in self.chosen.names]
        parts += [summary.more[name][i] for name in self.more for i in at]
        return torch.cat(parts, -1)


def beyond_summary(recipe: SideRecipe) -> tuple[Statistic, ...]:
    """What a side reads of a summary that stores do not hold."""
    return beyond_pooled(recipe.statistics) if isinstance(recipe, RidgeRecipe) else ()


def beyond_pooled(statistics: Statistics) -> tuple[Statistic, ...]:
    """The statistics that are no pooled tap."""
    names = statistics.split("+")
    return tuple(name for name in get_args(Statistic) if name in names)


@dataclass(frozen=True)
class RidgeSolution:
    """What `solve_ridge` found.

    Args:
        weight: (F, K) float64.
        bias: (K,) float64, near zero: the float32 features' mean is not exactly zero.
        l2: the chosen lambda.
        left_out: (n, K) float64 leave-one-out fits of the centred targets at that lambda.
        scores: the leave-one-out score of every lambda tried.
    """

    weight: Tensor
    bias: Tensor
    l2: float
    left_out: Tensor
    scores: dict[float, float]


def solve_ridge(
    x: Tensor,
    y: Tensor,
    score: Callable[[Tensor], float],
    *,
    lambdas: tuple[float, ...] = LAMBDAS,
    groups: NDArray[np.str_] | None = None,
) -> RidgeSolution:
    """Closed-form ridge with lambda chosen by the leave-one-out score.

    Args:
        x: (n, F) standardised features.
        y: (n, K) targets minus their training mean.
        score: judges left-out fits (n, K), higher is better.
        lambdas: tried in this order; of equal scores the one with the smaller left-out error wins.
        groups: (n,) names; a group is left out as a whole.
    """
    x_mean = x.double().mean(0)
    x = x.double() - x_mean
    y = y.double() - y.double().mean(0)
    with one_thread(when=min(x.shape) <= SMALL):
        eigenvalues, basis, to_weight = _decompose(x)
    coordinates = basis.T @ y
    best: tuple[tuple[float, float], float, Tensor] | None = None
    scores = {}
    for l2 in lambdas:
        shrink = eigenvalues / (eigenvalues + l2)
        left_out = _left_out(y, basis, shrink, groups)
        scores[l2] = score(left_out)
        rank = (scores[l2], -(y - left_out).square().mean().item())
        if best is None or rank > best[0]:
            best = rank, l2, left_out
    assert best is not None, "no lambda was given"
    _, l2, left_out = best
    weight = to_weight @ (coordinates / (eigenvalues + l2)[:, None])
    return RidgeSolution(weight, -x_mean @ weight, l2, left_out, scores)


def _decompose(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues s (r,) of X'X, left basis U (n, r), and Z (F, r) with W = Z (U'Y / (s + lambda))."""
    if x.shape[0] <= x.shape[1]:
        eigenvalues, basis = torch.linalg.eigh(x @ x.T)
        kept = eigenvalues > eigenvalues[-1] * 1e-12
        eigenvalues, basis = eigenvalues[kept], basis[:, kept]
        return eigenvalues, basis, x.T @ basis
    eigenvalues, right = torch.linalg.eigh(x.T @ x)
    kept = eigenvalues > eigenvalues[-1] * 1e-12
    eigenvalues, right = eigenvalues[kept], right[:, kept]
    return eigenvalues, (x @ right) / eigenvalues.sqrt(), right * eigenvalues.sqrt()


def _left_out(y: Tensor, basis: Tensor, shrink: Tensor, groups: NDArray[np.str_] | None) -> Tensor:
    """Fits of each sample (or group) by all the others; the unpenalised mean has leverage 1/n."""
    residual = y - basis @ (shrink[:, None] * (basis.T @ y))
    if groups is None:
        leverage = basis.square() @ shrink + 1.0 / len(y)
        return y - residual / (1.0 - leverage).clamp(min=1e-12)[:, None]
    left_out = torch.empty_like(y)
    for group in np.unique(groups):
        rows = torch.from_numpy(np.flatnonzero(groups == group))
        part = basis[rows]
        hat = part @ (shrink[:, None] * part.T) + 1.0 / len(y)
        identity = torch.eye(len(rows), dtype=y.dtype)
        left_out[rows] = y[rows] - torch.linalg.solve(identity - hat, residual[rows])
    return left_out

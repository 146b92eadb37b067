"""Linear probe: the common head alone on the pooled last tap.

    logits = Head(Norm(Pool(b_L)))

It has no parameters of its own. Its head is solved by L-BFGS to convergence, never trained by the
loop: an under-trained probe is no opponent (docs/explanation/design.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from sidetune.errors import DivergedError
from sidetune.features import Features
from sidetune.keyed import Draws
from sidetune.sides.base import Side, SideRecipe
from sidetune.tasks import Task
from sidetune.threads import SMALL, one_thread

PENALTIES = tuple(10.0**exponent for exponent in range(0, -6, -1))  # 1 .. 1e-5, each starts at the last
GRADIENT_TOLERANCE = 1e-6  # largest component of the gradient of the mean loss, in steps of unit curvature
MAX_ITERATIONS = 5_000
HISTORY = 20  # steps that L-BFGS remembers
LOSS_CURVATURE = 0.1  # of a softmax cross-entropy, about: p (1 - p) is 1/4 where nothing is learnt, then less


class LinearRecipe(SideRecipe):
    """The linear probe's dials.

    Args:
        pool: ``best`` tries cls, mean and both; validation chooses.
        l2: the penalty; None: validation chooses.
    """

    name: Literal["linear"] = "linear"
    pool: Literal["best", "cls", "mean", "cls+mean"] = "best"
    l2: float | None = Field(None, ge=0)


class Linear(Side):
    """Pool(b_L). Parameters: 0. Args as in `Side`."""

    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """b_L: (1, B, N, D)."""
        return self.scaled(features, self.spec.last.name)[None]


class Coordinates:
    """Features (n, F) in the basis where the loss is nearly round: their standardised principal axes.

    L-BFGS needs thousands of steps along the features as they are and some tens along these. The
    minimum is the same one: the penalty stays that of the standardised features.
    """

    def __init__(self, x: Tensor) -> None:
        x = x.double()
        self.mean, self.spread = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-12)
        with one_thread(when=min(x.shape) <= SMALL):
            left, self.singular, right = torch.linalg.svd((x - self.mean) / self.spread, full_matrices=False)
        self.axes: Tensor = right.T  # (F, r)
        self.along: Tensor = left * self.singular  # (n, r)

    def step(self, l2: float) -> Tensor:
        """Scale of each axis: one over the root of the loss's curvature along it, (r,)."""
        curvature: Tensor = LOSS_CURVATURE * self.singular.square() / len(self.along) + l2
        return curvature.clamp(min=1e-12).rsqrt()


@dataclass(frozen=True)
class LinearSolution:
    """What `solve_linear` found.

    Args:
        weight: (F, K) float64, of the features as they were given.
        bias: (K,) float64.
        along: (r + 1, K) the same along `Coordinates`, bias last: where another penalty starts.
        iterations: of L-BFGS.
        gradient: largest component of the gradient at the end, a step of unit curvature each.
    """

    weight: Tensor
    bias: Tensor
    along: Tensor
    iterations: int
    gradient: float


def solve_linear(
    x: Coordinates, target: Tensor, task: Task, l2: float, start: LinearSolution | None = None
) -> LinearSolution:
    """Minimise mean loss + l2/2 |W|^2 over W and b by L-BFGS, in float64; W is of standardised features.

    Args:
        x: n normed pooled features.
        target: (n,) or (n, K), as the task takes them.
        task: its loss.
        l2: the penalty.
        start: a solution for another penalty to start from.

    Raises:
        DivergedError: the gradient did not fall below the tolerance.
    """
    step = torch.cat([x.step(l2), torch.ones(1, dtype=torch.float64)])[:, None]  # the bias is not scaled
    inputs = torch.nn.functional.pad(x.along, (0, 1), value=1.0) * step.T
    penalty = l2 * step.square()
    penalty[-1] = 0.0
    shape = (len(step), task.num_outputs)

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        theta = torch.from_numpy(flat).view(shape).requires_grad_()
        loss = task.loss((inputs @ theta)[None], target).mean() + 0.5 * (penalty * theta.square()).sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        return loss.item(), gradient.flatten().numpy()

    first = torch.zeros(shape, dtype=torch.float64) if start is None else start.along / step
    options = {
        "maxiter": MAX_ITERATIONS,
        "maxfun": 2 * MAX_ITERATIONS,
        "gtol": GRADIENT_TOLERANCE,
        "ftol": 0,  # the gradient alone decides
        "maxcor": HISTORY,
    }
    with one_thread():
        found = scipy.optimize.minimize(
            objective, first.flatten().numpy(), jac=True, method="L-BFGS-B", options=options
        )
    gradient = float(np.abs(found.jac).max())
    if not gradient <= 10 * GRADIENT_TOLERANCE:
        raise DivergedError(
            f"the linear probe's gradient is {gradient:.1e} after {found.nit} L-BFGS iterations, expected "
            f"at most {10 * GRADIENT_TOLERANCE:.0e}. Type: --set side.l2=1e-3 for a stronger penalty"
        )
    along = torch.from_numpy(found.x).view(shape) * step
    weight = (x.axes @ along[:-1]) / x.spread[:, None]
    return LinearSolution(weight, along[-1] - x.mean @ weight, along, int(found.nit), gradient)

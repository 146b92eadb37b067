"""Linear probe: the common head alone on the pooled last tap.

    logits = Head(Norm(Pool(b_L)))

It has no parameters of its own. Its head is solved by L-BFGS to convergence, never trained by the
loop: an under-trained probe is no opponent (docs/explanation/design.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import minimize
from torch import Tensor

from sidetune.errors import DivergedError
from sidetune.features import Features
from sidetune.keyed import Draws
from sidetune.sides.base import Side, SideRecipe
from sidetune.tasks import Task

PENALTIES = tuple(10.0**exponent for exponent in range(0, -7, -1))  # 1 .. 1e-6, each starts at the last
GRADIENT_TOLERANCE = 1e-6  # largest component of the gradient of the mean loss
MAX_ITERATIONS = 5_000


class LinearRecipe(SideRecipe):
    """The linear probe's dials. Pool ``best`` tries cls, mean and both; validation chooses it and l2."""

    name: Literal["linear"] = "linear"
    pool: Literal["best", "cls", "mean", "cls+mean"] = "best"
    l2: float | None = Field(None, ge=0)


class Linear(Side):
    """Pool(b_L). Parameters: 0. Args as in `Side`."""

    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """b_L: (1, B, N, D)."""
        return self.scaled(features, self.spec.last.name)[None]


@dataclass(frozen=True)
class LinearSolution:
    """What `solve_linear` found.

    Args:
        weight: (F, K) float64.
        bias: (K,) float64.
        iterations: of L-BFGS.
        gradient: largest component of the gradient at the end.
    """

    weight: Tensor
    bias: Tensor
    iterations: int
    gradient: float


def solve_linear(
    x: Tensor, target: Tensor, task: Task, l2: float, start: LinearSolution | None = None
) -> LinearSolution:
    """Minimise mean loss + l2/2 |W|^2 over W and b by L-BFGS, in float64.

    Features are standardised inside, where the penalty applies, and folded back into W and b.

    Args:
        x: (n, F) normed pooled features.
        target: (n,) or (n, K), as the task takes them.
        task: its loss.
        l2: the penalty.
        start: a solution for another penalty to start from.

    Raises:
        DivergedError: the gradient did not fall below the tolerance.
    """
    x = x.double()
    mean, spread = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-12)
    standardised = (x - mean) / spread
    shape = (x.shape[1] + 1, task.num_outputs)  # the last row is the bias

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        theta = torch.from_numpy(flat).view(shape).requires_grad_()
        weight, bias = theta[:-1], theta[-1]
        loss = task.loss((standardised @ weight + bias)[None], target).mean()
        loss = loss + 0.5 * l2 * weight.square().sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        return loss.item(), gradient.flatten().numpy()

    first = torch.zeros(shape, dtype=torch.float64)
    if start is not None:
        first[:-1] = start.weight * spread[:, None]
        first[-1] = start.bias + mean @ start.weight
    options = {
        "maxiter": MAX_ITERATIONS,
        "maxfun": 2 * MAX_ITERATIONS,
        "gtol": GRADIENT_TOLERANCE,
        "ftol": 0,  # the gradient alone decides
    }
    found = minimize(objective, first.flatten().numpy(), jac=True, method="L-BFGS-B", options=options)
    gradient = float(np.abs(found.jac).max())
    if not gradient <= 10 * GRADIENT_TOLERANCE:
        raise DivergedError(
            f"the linear probe's gradient is {gradient:.1e} after {found.nit} L-BFGS iterations, expected "
            f"at most {10 * GRADIENT_TOLERANCE:.0e}. Type: --set side.l2=1e-3 for a stronger penalty"
        )
    theta = torch.from_numpy(found.x).view(shape)
    weight = theta[:-1] / spread[:, None]
    return LinearSolution(weight, theta[-1] - mean @ weight, int(found.nit), gradient)

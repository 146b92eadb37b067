"""AdamW for M networks that share their parameters' tensors and nothing else.

    g = g * min(1, clip / |g|)                    |g| over all of a member's parameters
    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
    w = (1 - lr * decay) w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Each member has its own rate, decay, clipping and count of steps t (Loshchilov & Hutter, ICLR 2019,
arXiv 1711.05101, algorithm 2). torch's optimisers have one rate a tensor; here a tensor holds M networks.
All parameters are views of one matrix with a row a member, so an update works on a row that stays in the
cache, and a member's whole state is three rows and a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
EPS = 1e-8
LARGE = 2**20  # numbers of a member, from which on gradients are not brought together: that would be a copy


@dataclass(frozen=True)
class MemberState:
    """All that training changes of one member: what a checkpoint keeps.

    Args:
        weights: (P,) every parameter.
        mean: (P,) of the gradient, decaying.
        square: (P,) of its square, likewise.
        steps: taken.
    """

    weights: Tensor
    mean: Tensor
    square: Tensor
    steps: int


@dataclass(frozen=True)
class Update:
    """What a member's step is taken with.

    Args:
        lr: rate.
        weight_decay: of matrices; norms, biases and vectors have none.
        clip_norm: largest norm of the gradient; None: any.
    """

    lr: float
    weight_decay: float
    clip_norm: float | None


class MemberAdamW:
    """AdamW over parameters with a leading member axis.

    The parameters become views of `weights_MP`: place them on their device first, and change them in place.

    Args:
        parameters: (M, ..) each. Those with one axis beside the members' do not decay.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        assert trained, "nothing to train"
        # what decays comes first, so that it is one slice
        self._parameters = sorted(trained, key=lambda parameter: parameter.ndim <= 2)
        self._sizes = [parameter[0].numel() for parameter in self._parameters]
        self._decaying = sum(p[0].numel() for p in self._parameters if p.ndim > 2)
        self.weights_MP = torch.cat([p.detach().flatten(1) for p in self._parameters], 1)
        parts = self.weights_MP.split(self._sizes, 1)
        for parameter, part_MP in zip(self._parameters, parts, strict=True):
            parameter.data = part_MP.unflatten(1, parameter.shape[1:])
        self.mean_MP = torch.zeros_like(self.weights_MP)
        self.square_MP = torch.zeros_like(self.weights_MP)
        self.steps = [0] * len(self.weights_MP)

    def get(self, member: int) -> MemberState:
        """A copy of one member's state."""
        weights, mean, square = (
            rows_MP[member].clone() for rows_MP in (self.weights_MP, self.mean_MP, self.square_MP)
        )
        return MemberState(weights, mean, square, self.steps[member])

    def put(self, member: int, state: MemberState) -> None:
        """Give a member the state of another time, or of another optimiser of equal parameters.

        Raises:
            ValueError: it is not of this optimiser's size.
        """
        for name in ("weights", "mean", "square"):
            found, expected = getattr(state, name).shape, self.weights_MP[member].shape
            if found != expected:
                raise ValueError(f"{name} has shape {tuple(found)}, expected {tuple(expected)}")
        self.weights_MP[member] = state.weights
        self.mean_MP[member] = state.mean
        self.square_MP[member] = state.square
        self.steps[member] = state.steps

    def step(self, updates: dict[int, Update]) -> None:
        """Update these members from their parameters' gradients; the others stay as they are.

        Args:
            updates: member -> how. The gradients are let go, those of a large network one after the other.
        """
        pieces = [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten(1).to(p.dtype)
            for p in self._parameters
        ]
        for parameter in self._parameters:
            parameter.grad = None
        if self.weights_MP.shape[1] < LARGE:
            pieces = [torch.cat(pieces, 1)]
        clips = {
            member: _clip([piece_Mp[member] for piece_Mp in pieces], update.clip_norm)
            for member, update in updates.items()
            if update.clip_norm is not None
        }
        for member in updates:
            self.steps[member] += 1
        end = self.weights_MP.shape[1]
        while pieces:  # from the back, for what is done there is gone
            gradient_Mp = pieces.pop()
            columns = slice(end - gradient_Mp.shape[1], end)
            for member, update in updates.items():
                if member in clips:
                    gradient_Mp[member] *= clips[member]
                self._update(member, columns, gradient_Mp[member], update)
            end = columns.start

    def _update(self, member: int, columns: slice, gradient_P: Tensor, update: Update) -> None:
        """Some columns of one member; see above."""
        weights_P, mean_P, square_P = (
            rows_MP[member, columns] for rows_MP in (self.weights_MP, self.mean_MP, self.square_MP)
        )
        mean_P.lerp_(gradient_P, 1 - BETAS[0])
        square_P.mul_(BETAS[1]).addcmul_(gradient_P, gradient_P, value=1 - BETAS[1])
        unbiased, unbiased_square = (1 - beta ** self.steps[member] for beta in BETAS)
        root_P = square_P.sqrt().div_(math.sqrt(unbiased_square)).add_(EPS)
        weights_P[: max(0, self._decaying - columns.start)] *= 1 - update.lr * update.weight_decay
        weights_P.addcdiv_(mean_P, root_P, value=-update.lr / unbiased)


def _clip(gradients: Sequence[Tensor], most: float) -> Tensor:
    """What a gradient in pieces is multiplied by, that its norm be no larger."""
    norms = [torch.linalg.vector_norm(one) for one in gradients]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    clip: Tensor = (most / (norm + 1e-6)).clamp(max=1.0)
    return clip

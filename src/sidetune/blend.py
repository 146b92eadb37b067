"""Two voices: a network's outputs and ridge's, each trained for itself, answer together.

    outputs = (1 - share) * network(x) + share * ridge(x)          share = head.ridge, or chosen

Outputs are logarithms of probabilities up to a constant, so this is the geometric mean of two answers.
Ridge's outputs are sharpened on left-out samples as in `sidetune.probes`. The network never meets ridge in
training: on top of ridge, even of its left-out outputs, it ended worse (docs/log.md). A member's ridge is
solved on the member's own rows, so what is held out of one is held out of both.

Since the share changes nothing in training, ``head.ridge=auto`` chooses it when training is done: the one
with the least loss on samples that neither voice has seen, each share at the temperature that suits it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sidetune.calibration import fit_temperature, plain
from sidetune.features import Features, Spec
from sidetune.summary import summarise
from sidetune.tasks import Task

AUTO = "auto"
SHARES = tuple(number / 20 for number in range(20))  # that `best_share` chooses from: 0, 0.05 .. 0.95


@dataclass(frozen=True)
class Solved:
    """Ridge on one member's rows.

    Args:
        centre: (F,) of the features.
        spread: (F,) likewise, times sqrt(F).
        weight: (F, K).
        bias: (K,).
    """

    centre: Tensor
    spread: Tensor
    weight: Tensor
    bias: Tensor


class Blend(nn.Module):
    """Every member's ridge and its share, frozen. They are solved, not trained, and count with the head.

    Args:
        spec: the taps that ridge reads: those of the side.
        members: M.
        num_outputs: K.

    Ridge has no share until `put` or `set_share` gives it one.
    """

    def __init__(self, spec: Spec, members: int, num_outputs: int) -> None:
        super().__init__()
        self.share_M = nn.Parameter(torch.zeros(members), requires_grad=False)
        width = sum(tap.width * (1 if tap.cls_index is None else 2) for tap in spec.taps)
        self.centre_MF = nn.Parameter(torch.zeros(members, width), requires_grad=False)
        self.spread_MF = nn.Parameter(torch.ones(members, width), requires_grad=False)
        self.weight_MFK = nn.Parameter(torch.zeros(members, width, num_outputs), requires_grad=False)
        self.bias_MK = nn.Parameter(torch.zeros(members, num_outputs), requires_grad=False)

    def put(self, member: int, solved: Solved, share: float) -> None:
        """Give a member its ridge; what a narrower one lacks of the widest member's K stays zero.

        Args:
            member: its number.
            solved: on its rows.
            share: of ridge in its answer, from 0 to 1.
        """
        self.share_M[member] = share
        own = len(solved.bias)
        self.centre_MF[member], self.spread_MF[member] = solved.centre, solved.spread
        self.weight_MFK[member, :, :own], self.bias_MK[member, :own] = solved.weight, solved.bias

    @property
    def share(self) -> float:
        """Of the one member's ridge."""
        assert len(self.share_M) == 1, self.share_M
        return round(self.share_M.item(), 2)

    def set_share(self, share: float) -> None:
        """Of all members."""
        self.share_M.fill_(share)

    def forward(self, network_MBK: Tensor, features: Features) -> Tensor:
        """The network's outputs -> both voices' (M, B, K)."""
        summary, dtype = summarise(features), self.weight_MFK.dtype
        pooled = [summary.pooled(name, "cls+mean") for name in summary.spec.names]
        x_BF = torch.cat(pooled, -1).to(dtype)
        x_MBF = (x_BF - self.centre_MF[:, None]) / self.spread_MF[:, None]
        ridge_MBK = torch.baddbmm(self.bias_MK[:, None], x_MBF, self.weight_MFK)
        share = self.share_M[:, None, None]
        return (1 - share) * network_MBK + share * ridge_MBK


@contextmanager
def ridge_alone(blends: Sequence[Blend]) -> Iterator[None]:
    """Inside, ridge alone answers; afterwards, the network alone."""
    for blend in blends:
        blend.set_share(1.0)
    try:
        yield
    finally:
        for blend in blends:
            blend.set_share(0.0)


def give_best_share(
    blends: Sequence[Blend], task: Task, network_nK: Tensor, ridge_nK: Tensor, target: Tensor
) -> Tensor:
    """Give ridge its best share in all of them. Returns what they answer then, (n, K); see `best_share`."""
    share = best_share(task, network_nK, ridge_nK, target)
    for blend in blends:
        blend.set_share(share)
    return (1 - share) * network_nK + share * ridge_nK


def best_share(task: Task, network_nK: Tensor, ridge_nK: Tensor, target: Tensor) -> float:
    """The share of ridge with the least loss; of equals the smallest.

    Args:
        task: its loss, as `fit_temperature` takes it: nothing weighted, smoothed or focused.
        network_nK: outputs of samples that the network was not trained on.
        ridge_nK: of the same, by a ridge that was not solved on them.
        target: theirs, as the task takes them.
    """
    unbent = plain(task)

    def loss(share: float) -> float:
        outputs = (1 - share) * network_nK + share * ridge_nK
        scaled = outputs / fit_temperature(task, outputs, target)
        return unbent.loss(scaled[None], target).mean().item()

    return min(SHARES, key=loss)

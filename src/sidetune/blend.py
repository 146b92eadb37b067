"""Two voices: a network's outputs and ridge's, each trained for itself, answer together.

    outputs = (1 - share) * network(x) + share * ridge(x)          share = head.ridge

Outputs are logarithms of probabilities up to a constant, so this is the geometric mean of two answers.
Ridge's outputs are sharpened on left-out samples as in `sidetune.probes`. The network never meets ridge in
training: on top of ridge, even of its left-out outputs, it ended worse (docs/log.md). A member's ridge is
solved on the member's own rows, so what is held out of one is held out of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sidetune.features import Features, Spec
from sidetune.summary import summarise


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
    """Every member's ridge, frozen. Its numbers are solved, not trained, and count with the head.

    Args:
        spec: the taps that ridge reads: those of the side.
        members: M.
        num_outputs: K.
        share: of ridge in the answer, above 0 and below 1.
    """

    def __init__(self, spec: Spec, members: int, num_outputs: int, share: float) -> None:
        super().__init__()
        self.share = share
        width = sum(tap.width * (1 if tap.cls_index is None else 2) for tap in spec.taps)
        self.centre_MF = nn.Parameter(torch.zeros(members, width), requires_grad=False)
        self.spread_MF = nn.Parameter(torch.ones(members, width), requires_grad=False)
        self.weight_MFK = nn.Parameter(torch.zeros(members, width, num_outputs), requires_grad=False)
        self.bias_MK = nn.Parameter(torch.zeros(members, num_outputs), requires_grad=False)

    def put(self, member: int, solved: Solved) -> None:
        """Give a member its ridge; what a narrower one lacks of the widest member's K stays zero."""
        own = len(solved.bias)
        self.centre_MF[member], self.spread_MF[member] = solved.centre, solved.spread
        self.weight_MFK[member, :, :own], self.bias_MK[member, :own] = solved.weight, solved.bias

    def forward(self, network_MBK: Tensor, features: Features) -> Tensor:
        """The network's outputs -> both voices' (M, B, K)."""
        summary, dtype = summarise(features), self.weight_MFK.dtype
        pooled = [summary.pooled(name, "cls+mean") for name in summary.spec.names]
        x_BF = torch.cat(pooled, -1).to(dtype)
        x_MBF = (x_BF - self.centre_MF[:, None]) / self.spread_MF[:, None]
        ridge_MBK = torch.baddbmm(self.bias_MK[:, None], x_MBF, self.weight_MFK)
        return (1 - self.share) * network_MBK + self.share * ridge_MBK

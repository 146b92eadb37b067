"""Attentive probe: one learned query pools the final tokens.

    w = softmax(b_L q / sqrt(D)) over tokens;   out = (sum_n w_n b_L[n]) V

Values D -> D and no key projection; attentive probes in the literature differ in both. The query
starts at zero and V at the identity, so the probe starts as the linear probe on the mean of all
tokens; this start is our choice.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sidetune.features import Features, Spec
from sidetune.keyed import Draws
from sidetune.sides.base import MemberModule, Side, SideRecipe


class AttentiveRecipe(SideRecipe):
    """The attentive probe has no dials: its query is its pool."""

    name: Literal["attentive"] = "attentive"


class Attentive(Side):
    """One query over the tokens of the last tap. Parameters a member: D + D * D.

    Args:
        spec: any taps; only the last is read.
        members: M.
    """

    def __init__(self, spec: Spec, *, members: int = 1) -> None:
        super().__init__(spec, members=members, pool="mean")
        self.query = Query(members, spec.last.width)

    @classmethod
    def reads(cls, spec: Spec) -> Spec:
        """The last tap alone."""
        return Spec((spec.last,))

    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """b_L: (1, B, N, D)."""
        return self.scaled(features, self.spec.last.name)[None]

    def forward(self, features: Features, draws: Draws | None = None) -> Tensor:
        """(M, B, D)."""
        pooled: Tensor = self.query(self.tokens(features, draws)[0], features.mask)
        return pooled

    def shares(self, features: Features) -> Tensor:
        """Each token's attention times its value: (M, B, N, D)."""
        shares: Tensor = self.query.shares(self.tokens(features)[0], features.mask)
        return shares


class Query(MemberModule):
    """The query and the value matrix of every member."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.query_MD = nn.Parameter(torch.zeros(members, width))
        self.value_MDD = nn.Parameter(torch.eye(width).repeat(members, 1, 1))

    def start_member(self, member: int, keyed: torch.Generator) -> None:
        """Nothing is drawn: the query starts at zero, the values at the identity."""

    def forward(self, x_BND: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, D) -> (M, B, D)."""
        pooled_MBD = torch.einsum("mbn,bnd->mbd", self.attention(x_BND, mask), x_BND)
        return torch.bmm(pooled_MBD, self.value_MDD)

    def shares(self, x_BND: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, D) -> (M, B, N, D), whose sum over N is `forward`."""
        return torch.einsum("mbn,bnd,mde->mbne", self.attention(x_BND, mask), x_BND, self.value_MDD)

    def attention(self, x_BND: Tensor, mask: Tensor | None) -> Tensor:
        """How much of each token is taken: (M, B, N), 1 in sum."""
        logits_MBN = torch.einsum("bnd,md->mbn", x_BND, self.query_MD) * x_BND.shape[-1] ** -0.5
        if mask is not None:
            logits_MBN = logits_MBN.masked_fill(~mask, -torch.inf)
        attention: Tensor = logits_MBN.softmax(-1)
        return attention

"""Fusion probe (Ciernik et al., 2026, arXiv 2601.09322): one learned query over the layers.

    x_t = LN([cls, mean] of every block),  t = 1..2L             pooled taps, no tokens
    w_h = softmax_t(x_t W_k,h q_h / sqrt(d)),  d = D / heads
    out = [sum_t w_h,t x_t W_v,h ; all heads] W_o

Multi-head cross-attention of one query, as read in the authors' code. What differs from it: a projection of
the query would fold into the query, and the affine of the layer norms into W_k and W_v, so neither stands
here; heads are D / heads wide, where theirs are twice that; their batch norm before the classifier is the
norm that all sides share. W_v and W_o start at the identity, so that the probe starts as a linear probe on a
mixture of the layers; the query is drawn, which trains faster than zero (docs/log.md). This start is ours.

The query is one for all samples, so W_k,h q_h is a vector a head: keys are never built.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sidetune.errors import SideError
from sidetune.features import Features, Spec
from sidetune.keyed import Draws
from sidetune.sides.base import (
    MemberModule,
    Pool,
    Side,
    SideRecipe,
    kept_blocks,
    normal_start,
    pool_tokens,
)

LAYER_NORM_EPS = 1e-6


class FusionRecipe(SideRecipe):
    """The fusion probe's dials; its query is its pool. See `Fusion`."""

    name: Literal["fusion"] = "fusion"
    heads: int = Field(8, ge=1)
    every: int = Field(1, ge=1)


class Fusion(Side):
    """One query over class token and mean of the block taps. Parameters a member: D + 3 * D * D.

    Args:
        spec: block taps of one width and grid.
        heads: divides D.
        members: M.
        every: read every k-th block, counted back from L.

    Raises:
        SideError: no block taps, unequal shapes, or heads do not divide D.
    """

    def __init__(self, spec: Spec, *, heads: int = 8, members: int = 1, every: int = 1) -> None:
        super().__init__(spec, members=members, pool="mean")
        self.blocks = kept_blocks(spec, every, "fusion")
        width = self.blocks[-1].width
        if width % heads:
            raise SideError(f"heads {heads} does not divide width {width}. Type: --set side.heads=1")
        self.query = LayerQuery(members, width, heads)

    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """b_L: (1, B, N, D)."""
        return self.scaled(features, self.blocks[-1].name)[None]

    def forward(self, features: Features, draws: Draws | None = None) -> Tensor:
        """(M, B, D)."""
        pooled: list[Tensor] = []
        for tap in self.blocks:
            b_BND = self.scaled(features, tap.name)
            pool: Pool = "mean" if tap.cls_index is None else "cls+mean"
            pooled += pool_tokens(b_BND, tap, pool, features.mask).split(tap.width, -1)
        out: Tensor = self.query(torch.stack(pooled, 1))
        return out

    def shares(self, features: Features) -> None:
        """None: the norm of each layer's mean makes it no sum over tokens."""
        return None


class LayerQuery(MemberModule):
    """The query, and the matrices of keys, values and output of every member."""

    def __init__(self, members: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        eye_MDD = torch.eye(width).repeat(members, 1, 1)
        self.query_MD = nn.Parameter(torch.zeros(members, width))
        self.key_MDD = nn.Parameter(torch.zeros(members, width, width))
        self.value_MDD = nn.Parameter(eye_MDD)
        self.out_MDD = nn.Parameter(eye_MDD.clone())

    def start_member(self, member: int, keyed: torch.Generator) -> None:
        """Keys normal with std 1/sqrt(D), the query with 1; values and output stay the identity."""
        normal_start(self.key_MDD, member, self.key_MDD.shape[1], keyed)
        normal_start(self.query_MD, member, 1, keyed)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (M, B, D)."""
        x_BTD = F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=LAYER_NORM_EPS)
        query_MHd = self.query_MD.unflatten(-1, (self.heads, -1))
        key_MDHd, value_MDHd = (w.unflatten(-1, (self.heads, -1)) for w in (self.key_MDD, self.value_MDD))
        folded_MDH = torch.einsum("mihd,mhd->mih", key_MDHd, query_MHd) * query_MHd.shape[-1] ** -0.5
        weights_MBTH = torch.einsum("bti,mih->mbth", x_BTD, folded_MDH).softmax(2)
        pooled_MBHD = torch.einsum("mbth,bti->mbhi", weights_MBTH, x_BTD)
        values_MBHd = torch.einsum("mbhi,mihd->mbhd", pooled_MBHD, value_MDHd)
        return torch.bmm(values_MBHd.flatten(2), self.out_MDD)

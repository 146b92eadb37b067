"""Res-Tuning-Bypass (Jiang et al., NeurIPS 2023, arXiv 2310.19859).

    x_0 = z_0
    x_l = Lat_l(b_l) + Ver_l(x_{l-1}),  l = 1..L               tokens = x_L
    Lat, Ver: A(x) = x + GELU(x W_down) W_up

A lateral and a vertical residual adapter a layer, on features out of which no gradient leads; z_0 is the
embedding, b_l the frozen pre-norm output of block l. The sum, the residual adapters and their GELU are read
in the authors' code. It has biases, and draws W_up (Xavier); here there are no biases and W_up starts at
zero, as in every side. The paper's text weighs the two by lambda and 1 - lambda, the code adds them. At the
start x_L is therefore the sum of z_0 and all b_l: not the linear probe, unlike the other sides.

Nothing mixes tokens: what an answer knows of the image beyond single tokens comes from the backbone.

`tokens` is the textbook form. `forward` computes the same pooled, exactly, and never builds x_l: as in LoSA
the state is a sum of taps that all members share, P_l = z_0 + b_1 + .. + b_l, and narrow codes C times their
stacked W_up, so that x_l W_down = P_l W_down + C (W_up W_down).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sidetune.features import Features, Spec
from sidetune.keyed import Draws
from sidetune.sides.base import (
    MemberModule,
    Pool,
    Side,
    SideRecipe,
    kept_blocks,
    member_products,
    need_embedding,
    normal_start,
    pool_tokens,
)


class BypassRecipe(SideRecipe):
    """The bypass' dials. See `Bypass`."""

    name: Literal["bypass"] = "bypass"
    rank: int = Field(11, ge=1)
    pool: Pool = "mean"
    every: int = Field(1, ge=1)


class Bypass(Side):
    """Res-Tuning-Bypass over the embedding and the block taps.

    Parameters a member: 4 * L * D * w, L the blocks that are read.

    Args:
        spec: the tap ``embedding`` and block taps of one width and grid.
        rank: w, width of an adapter's bottleneck; 11 gives the paper's 0.4 M on ViT-B.
        members: M.
        pool: see `Side`.
        every: read every k-th block, counted back from L.

    Raises:
        SideError: no embedding or block taps, or unequal shapes.
    """

    def __init__(
        self, spec: Spec, *, rank: int = 11, members: int = 1, pool: Pool = "mean", every: int = 1
    ) -> None:
        super().__init__(spec, members=members, pool=pool)
        need_embedding(spec, "bypass")
        self.blocks = kept_blocks(spec, every, "bypass")
        width = self.blocks[-1].width
        self.lateral = nn.ModuleList(Adapter(members, width, rank) for _ in self.blocks)
        self.vertical = nn.ModuleList(Adapter(members, width, rank) for _ in self.blocks)

    def forward(self, features: Features, draws: Draws | None = None) -> Tensor:
        """See `Side.forward`."""
        if self.pool == "tokens":
            return super().forward(features, draws)
        sum_BND = self.scaled(features, "embedding")  # P_l
        codes: list[Tensor] = []
        ups: list[Tensor] = []
        for tap, lateral, vertical in zip(self.blocks, self.lateral, self.vertical, strict=True):
            assert isinstance(lateral, Adapter) and isinstance(vertical, Adapter)
            b_BND = self.scaled(features, tap.name)
            down_MBNR = member_products(sum_BND[None], vertical.down_MDR)
            if codes:
                up_down_MKR = torch.bmm(torch.cat(ups, 1), vertical.down_MDR)
                down_MBNR = down_MBNR + member_products(torch.cat(codes, -1), up_down_MKR)
            codes += [F.gelu(member_products(b_BND[None], lateral.down_MDR)), F.gelu(down_MBNR)]
            ups += [lateral.up_MRD, vertical.up_MRD]
            sum_BND = sum_BND + b_BND
        pooled_BW = pool_tokens(sum_BND, self.out, self.pool, features.mask)
        return pooled_BW + self.pooled_product(torch.cat(codes, -1), torch.cat(ups, 1), features)

    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """x_L: (M, B, N, D), in the textbook form."""
        x_MBND = self.scaled(features, "embedding")[None]
        for tap, lateral, vertical in zip(self.blocks, self.lateral, self.vertical, strict=True):
            x_MBND = lateral(self.scaled(features, tap.name)[None]) + vertical(x_MBND)
        return x_MBND


class Adapter(MemberModule):
    """A(x) = x + GELU(x W_down) W_up."""

    def __init__(self, members: int, width: int, rank: int) -> None:
        super().__init__()
        self.down_MDR = nn.Parameter(torch.zeros(members, width, rank))
        self.up_MRD = nn.Parameter(torch.zeros(members, rank, width))

    def start_member(self, member: int, keyed: torch.Generator) -> None:
        """Down normal with std 1/sqrt(D), up zero."""
        normal_start(self.down_MDR, member, self.down_MDR.shape[1], keyed)

    def forward(self, x_MBND: Tensor) -> Tensor:
        """(M or 1, B, N, D) -> (M, B, N, D)."""
        code_MBNR = F.gelu(member_products(x_MBND, self.down_MDR))
        return x_MBND + member_products(code_MBNR, self.up_MRD)

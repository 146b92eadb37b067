"""LST, Ladder Side-Tuning (Sung, Cho and Bansal, NeurIPS 2022, arXiv 2206.06522).

    s = Down_0(z_0)
    s <- m_l s + (1 - m_l) Down_l(b_l),  m_l = sigmoid(gate_l / 0.1)
    s <- s + Attention_l(LN(s));  s <- s + MLP_l(LN(s)),            l = 1..L
    tokens = b_L + Up(LN(s))

A transformer of width d = D/r beside the backbone: z_0 is the embedding, b_l the frozen pre-norm output of
block l. The gate (one number a layer, zero at the start, over a temperature of 0.1), the blend before each
block, Down_0, the last layer norm and Up are read in the authors' code, which is for language models. What
differs from it: the blocks are a vision transformer's (layer norm, GELU, no relative positions), they start
from a draw and not from pruned weights of the backbone, which a side never sees, and b_L is added at the
end. The authors' output is Up(..) alone (``keep_last`` off); with b_L and Up at zero the side starts as the
linear probe, as the others here do, so that what it learns is what it adds.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    member_products,
    member_rates,
    need_embedding,
    normal_start,
    pool_tokens,
)

LAYER_NORM_EPS = 1e-6
GATE_TEMPERATURE = 0.1  # the authors' gate_T
MLP_RATIO = 4  # hidden width of an MLP over d


class LadderRecipe(SideRecipe):
    """LST's dials; the first value of each switch is the default. See `Ladder`."""

    name: Literal["ladder"] = "ladder"
    reduction: int = Field(8, ge=1)
    pool: Pool = "mean"
    heads: int = Field(4, ge=1)
    keep_last: bool = True
    every: int = Field(1, ge=1)
    drop_path: float = Field(0.0, ge=0, lt=1)


class Ladder(Side):
    """LST over the embedding and the block taps.

    Parameters a member, with d = D/r: (L + 2) * D * d + L * (12 * d * d + 4 * d + 1) + 2 * d, L the blocks
    that are read.

    Args:
        spec: the tap ``embedding`` and block taps of one width and grid.
        reduction: r, which divides D.
        members: M.
        pool: see `Side`.
        heads: of each block's attention; divides d.
        keep_last: whether b_L is part of the final tokens; without it Up starts drawn.
        every: read every k-th block, counted back from L; the network has a block for each that is read.
        drop_path: probability that a sample skips a branch of a block in training.

    `drop_path` may be one rate a member.

    Raises:
        SideError: no embedding or block taps, unequal shapes, r does not divide D or heads d, or
            drop-path's rates are not one a member.
    """

    def __init__(  # noqa: PLR0913 - one switch a choice
        self,
        spec: Spec,
        *,
        reduction: int = 8,
        members: int = 1,
        pool: Pool = "mean",
        heads: int = 4,
        keep_last: bool = True,
        every: int = 1,
        drop_path: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__(spec, members=members, pool=pool)
        need_embedding(spec, "ladder")
        self.blocks = kept_blocks(spec, every, "ladder")
        self.keep_last, self.drop_path = keep_last, member_rates(drop_path, members)
        width = self.blocks[-1].width
        if width % reduction:
            raise SideError(
                f"reduction {reduction} does not divide width {width}. Type: --set side.reduction=1"
            )
        narrow = width // reduction
        if narrow % heads:
            raise SideError(f"heads {heads} does not divide width {narrow}. Type: --set side.heads=1")
        self.down = nn.ModuleList(Projection(members, width, narrow) for _ in range(len(self.blocks) + 1))
        self.gate = nn.ParameterList(torch.zeros(members, 1) for _ in self.blocks)
        self.block = nn.ModuleList(Block(members, narrow, heads) for _ in self.blocks)
        self.norm = AffineNorm(members, narrow)
        self.up = Projection(members, narrow, width, zero=keep_last)

    def forward(self, features: Features, draws: Draws | None = None) -> Tensor:
        """See `Side.forward`. Up is linear: it meets what is pooled of s, not every token."""
        if self.pool == "tokens":
            return super().forward(features, draws)
        up_MBW = self.pooled_product(self.state(features, draws), self.up.weight_MIO, features)
        if not self.keep_last:
            return up_MBW
        b_BND = self.scaled(features, self.blocks[-1].name)
        return pool_tokens(b_BND, self.out, self.pool, features.mask) + up_MBW

    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """b_L + Up(LN(s)): (M, B, N, D)."""
        up_MBND: Tensor = self.up(self.state(features, draws))
        return self.scaled(features, self.blocks[-1].name) + up_MBND if self.keep_last else up_MBND

    def state(self, features: Features, draws: Draws | None = None) -> Tensor:
        """LN(s) behind the last block: (M, B, N, d)."""
        keep_JMB = self.branch_keep(self.drop_path, 2 * len(self.blocks), features, draws)
        s_MBNd = self.down[0](self.scaled(features, "embedding")[None])
        for layer, tap in enumerate(self.blocks):
            b_BND = self.scaled(features, tap.name)
            m_M111 = torch.sigmoid(self.gate[layer] / GATE_TEMPERATURE)[:, :, None, None]
            s_MBNd = m_M111 * s_MBNd + (1 - m_M111) * self.down[layer + 1](b_BND[None])
            keep = None if keep_JMB is None else keep_JMB[2 * layer : 2 * layer + 2, :, :, None, None]
            s_MBNd = self.block[layer](s_MBNd, features.mask, keep)
        normed: Tensor = self.norm(s_MBNd)
        return normed


class Projection(MemberModule):
    """x W, with a W a member."""

    def __init__(self, members: int, width: int, out: int, *, zero: bool = False) -> None:
        super().__init__()
        self.zero = zero
        self.weight_MIO = nn.Parameter(torch.zeros(members, width, out))

    def start_member(self, member: int, keyed: torch.Generator) -> None:
        """Normal with std 1/sqrt(width), or zero."""
        if not self.zero:
            normal_start(self.weight_MIO, member, self.weight_MIO.shape[1], keyed)

    def forward(self, x_MBNI: Tensor) -> Tensor:
        """(M or 1, B, N, I) -> (M, B, N, O)."""
        return member_products(x_MBNI, self.weight_MIO)


class AffineNorm(nn.Module):
    """Layer norm over the last axis, with an affine a member."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight_MD = nn.Parameter(torch.ones(members, width))
        self.bias_MD = nn.Parameter(torch.zeros(members, width))

    def forward(self, x_MBND: Tensor) -> Tensor:
        """(M, B, N, D) -> (M, B, N, D)."""
        normed = F.layer_norm(x_MBND, x_MBND.shape[-1:], eps=LAYER_NORM_EPS)
        return normed * self.weight_MD[:, None, None] + self.bias_MD[:, None, None]


class Block(nn.Module):
    """A pre-norm transformer block: s + Attention(LN(s)), then the same with an MLP."""

    def __init__(self, members: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = AffineNorm(members, width), AffineNorm(members, width)
        self.qkv = Projection(members, width, 3 * width)
        self.out = Projection(members, width, width)
        self.wide = Projection(members, width, MLP_RATIO * width)
        self.narrow = Projection(members, MLP_RATIO * width, width)

    def forward(self, s_MBND: Tensor, mask: Tensor | None, keep: Tensor | None) -> Tensor:
        """(M, B, N, d) -> (M, B, N, d); masked tokens are no keys.

        Args:
            s_MBND: the state.
            mask: (B, N) bool.
            keep: (2, M, B, 1, 1), what drop-path multiplies the two branches by; None: neither is dropped.
        """
        attention = self._attention(self.norm_attention(s_MBND), mask)
        s_MBND = s_MBND + (attention if keep is None else keep[0] * attention)
        mlp: Tensor = self.narrow(F.gelu(self.wide(self.norm_mlp(s_MBND))))
        return s_MBND + (mlp if keep is None else keep[1] * mlp)

    def _attention(self, x_MBND: Tensor, mask: Tensor | None) -> Tensor:
        members, batch, num_tokens, _ = x_MBND.shape
        q, k, v = (
            part.reshape(members * batch, num_tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x_MBND).chunk(3, dim=-1)
        )
        keys = None if mask is None else mask.repeat(members, 1)[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2)
        out: Tensor = self.out(mixed.reshape(members, batch, num_tokens, -1))
        return out

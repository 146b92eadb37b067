"""LAST, Low-rank Attention Side-Tuning (Tang et al., 2024, arXiv 2402.04009).

    LSA_i(x) = softmax(Q K^T / sqrt(R/heads)) V W_out,   Q,K,V = LN_i(x) W_{q,k,v}   (D->R)
    u_0 = z_0 + LSA_0(z_0)
    v_i = u_{i-1} + z_i;   u_i = v_i + LSA_i(v_i),   i = 1..L
    tokens = u_L - sum_{i<L} z_i  ==  z_L + sum_i LSA_i(.)

Of a clip each module is two, with weights of their own: LSA over the tokens of a frame, then LSA' over the
frames at a place, on what the first left: u_i = v_i + LSA_i(v_i) + LSA'_i(v_i + LSA_i(v_i)). Frames come out
of the backbone one by one and attention knows no order, so LSA' adds to its normed input where in time a
frame stands, as fixed sines (Vaswani et al., 2017), without a parameter.

z_0 is the embedding that enters block 1, z_i the frozen pre-norm output of block i. The second form
of ``tokens`` is the one computed: no large sums cancel in bf16. The order inside a module, the layer
sums and the correction are stated; one module on the embedding and R = 16 are inferred from the
published 0.66 M parameters; heads are unknown. W_out starts at zero, so the side starts as the
linear probe.

Here stands the textbook form, one line an equation. `forward` computes the same in the fast form of
`sidetune.sides.last_fast`, exactly, unless ``form`` is ``textbook``.
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
    Form,
    MemberModule,
    Pool,
    Side,
    SideRecipe,
    Time,
    divided_frames,
    kept_blocks,
    known_form,
    member_rates,
    need_embedding,
    normal_start,
)
from sidetune.sides.last_fast import places_in_time, pooled_last

LAYER_NORM_EPS = 1e-6


class LastRecipe(SideRecipe):
    """LAST's dials; the first value of each switch is the default. See `Last`."""

    name: Literal["last"] = "last"
    rank: int = Field(16, ge=1)
    pool: Pool = "mean"
    heads: int = Field(1, ge=1)
    keep_last: bool = True
    every: int = Field(1, ge=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    time: Time = "divided"
    form: Form = "fast"


class Last(Side):
    """LAST over the embedding and the block taps.

    Parameters a member: (L + 1) * (4 * D * R + 2 * D), L the blocks that are read; of clips twice as many.

    Args:
        spec: the tap ``embedding`` and block taps of one width and grid.
        rank: R, the width of attention, over all heads.
        members: M.
        pool: see `Side`.
        heads: divides R.
        keep_last: whether z_L is part of the final tokens.
        every: read every k-th block, counted back from L; blocks left out enter no sum.
        drop_path: probability that a sample skips an LSA branch in training.
        time: of clips: ``divided`` into space and time, or ``joint``: one attention over all their tokens.
        form: ``fast`` or ``textbook``: the same outputs and gradients.

    `drop_path` may be one rate a member.

    Raises:
        SideError: no embedding or block taps, unequal shapes, heads do not divide R, or
            drop-path's rates are not one a member.
    """

    def __init__(  # noqa: PLR0913 - the paper's uncertain choices, one switch each
        self,
        spec: Spec,
        *,
        rank: int = 16,
        members: int = 1,
        pool: Pool = "mean",
        heads: int = 1,
        keep_last: bool = True,
        every: int = 1,
        drop_path: float | Sequence[float] = 0.0,
        time: Time = "divided",
        form: Form = "fast",
    ) -> None:
        super().__init__(spec, members=members, pool=pool)
        self.blocks = kept_blocks(spec, every, "last")
        self.frames = divided_frames(spec.last, time)
        self.keep_last, self.heads = keep_last, heads
        self.drop_path = member_rates(drop_path, members)
        self.form = known_form(form)
        need_embedding(spec, "last")
        if rank % heads:
            raise SideError(f"heads {heads} does not divide rank {rank}. Type: --set side.heads=1")
        self.attention, self.time_attention = (
            nn.ModuleList(LowRankSelfAttention(members, spec.last.width, rank, heads) for _ in range(count))
            for count in (len(self.blocks) + 1, (len(self.blocks) + 1) * (self.frames is not None))
        )

    def forward(self, features: Features, draws: Draws | None = None) -> Tensor:
        """See `Side.forward`."""
        if self.form == "textbook":
            return super().forward(features, draws)
        return pooled_last(self, features, self._keep(features, draws), LAYER_NORM_EPS)

    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """z_L + sum_i LSA_i(v_i): (M, B, N, D), in the textbook form."""
        keep_IMB = self._keep(features, draws)
        z_BND = self.scaled(features, "embedding")
        z_sum_BND, lsa_sum_MBND = z_BND, torch.zeros_like(z_BND).expand(self.members, *z_BND.shape)
        for i, module in enumerate(self.in_order):
            at, is_time = divmod(i, 2) if self.frames else (i, 0)
            if at and not is_time:
                z_BND = self.scaled(features, self.blocks[at - 1].name)
                z_sum_BND = z_sum_BND + z_BND
            out_MBND = self._attended(module, is_time, z_sum_BND + lsa_sum_MBND, features.mask)
            if keep_IMB is not None:
                out_MBND = out_MBND * keep_IMB[i][:, :, None, None]
            lsa_sum_MBND = lsa_sum_MBND + out_MBND
        return z_BND + lsa_sum_MBND if self.keep_last else lsa_sum_MBND

    @property
    def in_order(self) -> nn.ModuleList:
        """All modules as they run: of clips space and time in turn."""
        if self.frames is None:
            return self.attention
        return nn.ModuleList(
            module for pair in zip(self.attention, self.time_attention, strict=True) for module in pair
        )

    def _attended(self, module: nn.Module, is_time: int, v_MBND: Tensor, mask: Tensor | None) -> Tensor:
        """A module's output: over all tokens, or those of a frame, or those of a place: (M, B, N, D)."""
        if self.frames is None:
            return module(v_MBND, mask)  # type: ignore[no-any-return]
        v_MBTSD = v_MBND.unflatten(2, (self.frames, -1))
        mask_BTS = None if mask is None else mask.unflatten(1, (self.frames, -1))
        if is_time:
            v_MBTSD, mask_BTS = v_MBTSD.transpose(2, 3), None if mask_BTS is None else mask_BTS.mT
        places_TD = places_in_time(self.frames, v_MBND.shape[-1], like=v_MBND) if is_time else None
        mask_XN = None if mask_BTS is None else mask_BTS.flatten(0, 1)
        out: Tensor = module(v_MBTSD.flatten(1, 2), mask_XN, places_TD)
        out_MBTSD = out.view(v_MBTSD.shape)
        return (out_MBTSD.transpose(2, 3) if is_time else out_MBTSD).flatten(2, 3)

    def _keep(self, features: Features, draws: Draws | None) -> Tensor | None:
        return self.branch_keep(
            self.drop_path, len(self.attention) + len(self.time_attention), features, draws
        )


class LowRankSelfAttention(MemberModule):
    """LSA(x): layer norm, attention of width R over the tokens of a sample, back to width D."""

    def __init__(self, members: int, width: int, rank: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_weight_MD = nn.Parameter(torch.ones(members, width))
        self.norm_bias_MD = nn.Parameter(torch.zeros(members, width))
        self.qkv_MDR = nn.Parameter(torch.zeros(members, width, 3 * rank))
        self.out_MRD = nn.Parameter(torch.zeros(members, rank, width))

    def start_member(self, member: int, keyed: torch.Generator) -> None:
        """q, k, v normal with std 1/sqrt(D), out zero, layer norm the identity."""
        normal_start(self.qkv_MDR, member, self.qkv_MDR.shape[1], keyed)

    def forward(self, x_MBND: Tensor, mask: Tensor | None, places_ND: Tensor | None = None) -> Tensor:
        """(M, B, N, D) -> (M, B, N, D); masked tokens are no keys, and places are added behind the norm."""
        members, batch, num_tokens, width = x_MBND.shape
        normed = F.layer_norm(x_MBND, (width,), eps=LAYER_NORM_EPS)
        normed = normed * self.norm_weight_MD[:, None, None] + self.norm_bias_MD[:, None, None]
        if places_ND is not None:
            normed = normed + places_ND
        qkv = torch.bmm(normed.flatten(1, 2), self.qkv_MDR)
        q, k, v = (
            part.reshape(members * batch, num_tokens, self.heads, -1).transpose(1, 2)
            for part in qkv.view(members * batch, num_tokens, -1).chunk(3, dim=-1)
        )
        keys = None if mask is None else mask.repeat(members, 1)[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2)
        return torch.bmm(mixed.reshape(members, batch * num_tokens, -1), self.out_MRD).view_as(x_MBND)

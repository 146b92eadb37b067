"""Two hybrids, for the ablations alone: LAST with LoSA's token mixer, LoSA with LAST's attention.

Which part makes the difference, the skeleton or how tokens meet? LAST's tokens meet in attention, by what
they hold; LoSA's in a static product, by where they stand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetune.features import Features, FinalNorm, Spec
from sidetune.keyed import Draws
from sidetune.model import SideModel
from sidetune.recipe import Recipe
from sidetune.sides.base import MemberModule, Side, kept_blocks, normal_start
from sidetune.sides.last import LAYER_NORM_EPS, LowRankSelfAttention
from sidetune.sides.losa import ChannelMixer, TokenMixer


class LosaWithAttention(Side):
    """y_l = y_{l-1} + c + LSA(h + c), c = C(h), h = b_l + y_{l-1}: LoSA whose tokens meet in attention."""

    def __init__(self, spec: Spec, *, rank: int, members: int = 1) -> None:
        super().__init__(spec, members=members, pool="mean")
        self.blocks = kept_blocks(spec, 1, "losa")
        width = spec.last.width
        self.channel = nn.ModuleList(ChannelMixer(members, width, rank, 1.0) for _ in self.blocks)
        self.attention = nn.ModuleList(LowRankSelfAttention(members, width, rank, 1) for _ in self.blocks)

    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """y_L: (M, B, N, D)."""
        y_BND = self.scaled(features, self.blocks[-1].name)
        y_MBND = y_BND.expand(self.members, *y_BND.shape)
        for tap, channel, attention in zip(self.blocks, self.channel, self.attention, strict=True):
            h_MBND = self.scaled(features, tap.name) + y_MBND
            c_MBND = channel(h_MBND)
            y_MBND = y_MBND + c_MBND + attention(h_MBND + c_MBND, features.mask)
        return y_MBND


class StaticLast(Side):
    """LAST in which W_up GELU(W_down V) over tokens stands for softmax(Q K^T) V."""

    def __init__(self, spec: Spec, *, rank: int, members: int = 1) -> None:
        super().__init__(spec, members=members, pool="mean")
        self.blocks = kept_blocks(spec, 1, "last")
        self.mixer = nn.ModuleList(
            StaticMixer(members, spec.last.width, spec.last.num_tokens, rank)
            for _ in range(len(self.blocks) + 1)
        )

    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """z_L + sum_i S_i(v_i): (M, B, N, D)."""
        z_BND = self.scaled(features, "embedding")
        z_sum_BND, mixed_MBND = z_BND, self.mixer[0](z_BND[None], features.mask)
        for tap, mixer in zip(self.blocks, list(self.mixer)[1:], strict=True):
            z_BND = self.scaled(features, tap.name)
            z_sum_BND = z_sum_BND + z_BND
            mixed_MBND = mixed_MBND + mixer(z_sum_BND + mixed_MBND, features.mask)
        return z_BND + mixed_MBND


class StaticMixer(MemberModule):
    """S(x) = (W_up GELU(W_down LN(x) W_v)) W_out: LSA's places, LoSA's meeting of tokens."""

    def __init__(self, members: int, width: int, num_tokens: int, rank: int) -> None:
        super().__init__()
        self.value_MDR = nn.Parameter(torch.zeros(members, width, rank))
        self.token = TokenMixer(members, num_tokens, rank, 1.0)
        self.out_MRD = nn.Parameter(torch.zeros(members, rank, width))

    def start_member(self, member: int, keyed: torch.Generator) -> None:
        """Values and the mixer's up drawn, out zero: with both zero nothing would ever learn."""
        normal_start(self.value_MDR, member, self.value_MDR.shape[1], keyed)
        normal_start(self.token.up_MNR, member, self.token.up_MNR.shape[2], keyed)

    def forward(self, x_MBND: Tensor, mask: Tensor | None) -> Tensor:
        """(M or 1, B, N, D) -> (M, B, N, D)."""
        normed = F.layer_norm(x_MBND, x_MBND.shape[-1:], eps=LAYER_NORM_EPS)
        values_MBNR = torch.matmul(normed, self.value_MDR[:, None])
        return torch.matmul(self.token(values_MBNR, mask), self.out_MRD[:, None])


HYBRIDS: dict[str, type[LosaWithAttention] | type[StaticLast]] = {
    "losa, attention for its token mixer": LosaWithAttention,
    "last, a static token mixer for its attention": StaticLast,
}


def build_hybrid(
    name: str, spec: Spec, final_norm: FinalNorm | None, recipes: Sequence[Recipe], num_outputs: int
) -> SideModel:
    """M members of a hybrid, of the rank and the head that their recipe has."""
    rank: int = recipes[0].side.rank  # type: ignore[union-attr]
    side = HYBRIDS[name](spec, rank=rank, members=len(recipes))
    return SideModel(side, num_outputs, norm=recipes[0].head.norm, final_norm=final_norm)

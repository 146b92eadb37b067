"""LoSA, Low-rank Side Adaptation (Mercea et al., CVPR 2024, arXiv 2402.02887).

    y_0 = b_L
    y_l = y_{l-1} + g_l(b_l + y_{l-1}),  l = 1..L              tokens = y_L

    C_l(X) = a * GELU(X Wc_down) Wc_up                         mixes channels
    T_l(X) = a * Wt_up GELU(Wt_down X)                         mixes tokens
    h = b_l + y_{l-1};  c = C_l(h);  t = T_l(h + c);  g_l(h) = c + t

Of a clip, h (B, T, S, D), what mixes tokens is two: Space is T_l over the S tokens of a frame, and Time mixes
frames at the width of the bottleneck,

    Time(X) = a * (Wt_up GELU(Wt_down (X Wd_down))) Wd_up      Wt_down (R', T)  Wt_up (T, R')  R' = min(R, T)
    c = C(h);  s = Space(h + c);  u = Time(h + c + s);  g_l(h) = c + s + u

b_l (B, N, D) is the frozen pre-norm output of block l. No official code is public: this is a
reconstruction, and each uncertain choice is a switch (docs/explanation/design.md has the evidence).
The recursion is read in a third party's code; that both mixers alternate is stated; their order and
composition are inferred, and of a clip all but that space and time are divided. Up-projections start at
zero, so the side starts as the linear probe; of the two of Time the last one does.

Here stands the textbook form, one line an equation. `forward` computes the same in the fast form of
`sidetune.sides.losa_fast`, but for rounding, unless ``form`` is ``textbook``.
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
    normal_start,
)
from sidetune.sides.chunks import Scratches
from sidetune.sides.losa_fast import pooled_losa

Order = Literal["channel->token", "token->channel", "parallel"]
FirstState = Literal["b_L", "zero", "z_0"]


class LosaRecipe(SideRecipe):
    """LoSA's dials; the first value of each switch is the default. See `Losa`."""

    name: Literal["losa"] = "losa"
    rank: int = Field(8, ge=1)
    pool: Pool = "mean"
    order: Order = "channel->token"
    mix_tokens: bool = True
    first_state: FirstState = "b_L"
    a: float = 1.0
    every: int = Field(1, ge=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    time: Time = "divided"
    form: Form = "fast"


class Losa(Side):
    """LoSA over the block taps.

    Parameters a member: 2 * R * L * (D + N); without token mixing 2 * R * L * D. Of clips, S tokens a frame:
    2 * R * L * (2 * D + S) + 2 * L * T * min(R, T).

    Args:
        spec: taps of one width and grid.
        rank: R of both mixers.
        members: M.
        pool: see `Side`.
        order: which mixer sees the other's output; ``parallel``: neither does.
        mix_tokens: off leaves the channel mixers alone.
        first_state: y_0.
        a: scale of both mixers.
        every: read every k-th block, counted back from L.
        drop_path: probability that a sample skips a layer's g_l in training.
        time: of clips: ``divided`` into space and time, or ``joint``: one mixer of all their tokens.
        form: ``fast`` or ``textbook``: the same outputs and gradients, but for rounding: the fast form
            computes in the parameters' type, and refuses taps that want a gradient.

    `drop_path` may be one rate a member.

    Raises:
        SideError: no block taps, unequal shapes, y_0 = z_0 without an embedding tap, or drop-path's rates
            are not one a member.
    """

    def __init__(  # noqa: PLR0913 - the paper's uncertain choices, one switch each
        self,
        spec: Spec,
        *,
        rank: int = 8,
        members: int = 1,
        pool: Pool = "mean",
        order: Order = "channel->token",
        mix_tokens: bool = True,
        first_state: FirstState = "b_L",
        a: float = 1.0,
        every: int = 1,
        drop_path: float | Sequence[float] = 0.0,
        time: Time = "divided",
        form: Form = "fast",
    ) -> None:
        super().__init__(spec, members=members, pool=pool)
        self.blocks = kept_blocks(spec, every, "losa")
        self.order, self.first_state, self.a = order, first_state, a
        self.drop_path = member_rates(drop_path, members)
        self.frames = divided_frames(spec.last, time) if mix_tokens else None
        self.form: Form = known_form(form)
        self.scratches = Scratches()
        if first_state == "z_0" and "embedding" not in spec.names:
            raise SideError(
                "first_state z_0 needs the tap 'embedding', which is not read. "
                "Type: --set side.first_state=b_L"
            )
        width, num_tokens = self.blocks[0].width, self.blocks[0].num_tokens // (self.frames or 1)
        self.channel = nn.ModuleList(ChannelMixer(members, width, rank, a) for _ in self.blocks)
        self.token = nn.ModuleList(
            TokenMixer(members, num_tokens, rank, a) for _ in self.blocks if mix_tokens
        )
        self.time = nn.ModuleList(
            TimeMixer(members, self.frames, width, rank, a) for _ in self.blocks if self.frames
        )

    def forward(self, features: Features, draws: Draws | None = None) -> Tensor:
        """See `Side.forward`."""
        every_token_of_clips = self.frames is not None and self.pool == "tokens"  # nothing is pooled there
        if self.form == "textbook" or every_token_of_clips:
            return super().forward(features, draws)
        return pooled_losa(self, features, self._keep(features, draws))

    def rest(self) -> None:
        """See `Side.rest`."""
        self.scratches = Scratches()

    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """y_L: (M, B, N, D), in the textbook form."""
        y_MBND, keep_LMB = self._first_state(features), self._keep(features, draws)
        for layer, tap in enumerate(self.blocks):
            h_MBND = self.scaled(features, tap.name) + y_MBND
            g_MBND = self._mix(layer, h_MBND, features.mask)
            if keep_LMB is not None:
                g_MBND = g_MBND * keep_LMB[layer][:, :, None, None]
            y_MBND = y_MBND + g_MBND
        return y_MBND

    def _keep(self, features: Features, draws: Draws | None) -> Tensor | None:
        return self.branch_keep(self.drop_path, len(self.blocks), features, draws)

    def _first_state(self, features: Features) -> Tensor:
        last = self.scaled(features, self.blocks[-1].name)
        if self.first_state == "zero":
            last = torch.zeros_like(last)
        elif self.first_state == "z_0":
            last = self.scaled(features, "embedding")
        return last.expand(self.members, *last.shape)

    def _mix(self, layer: int, h_MBND: Tensor, mask: Tensor | None) -> Tensor:
        """g_l(h); never h itself: the outer residual carries it."""
        channel = self.channel[layer]
        if not self.token:
            return channel(h_MBND)  # type: ignore[no-any-return]
        if self.order == "channel->token":
            c_MBND = channel(h_MBND)
            t_MBND = self._mix_tokens(layer, h_MBND + c_MBND, mask)
        elif self.order == "token->channel":
            t_MBND = self._mix_tokens(layer, h_MBND, mask)
            c_MBND = channel(h_MBND + t_MBND)
        else:
            c_MBND, t_MBND = channel(h_MBND), self._mix_tokens(layer, h_MBND, mask)
        return c_MBND + t_MBND  # type: ignore[no-any-return]

    def _mix_tokens(self, layer: int, x_MBND: Tensor, mask: Tensor | None) -> Tensor:
        """T_l; of a clip Space, then Time on what that leaves."""
        if self.frames is None:
            return self.token[layer](x_MBND, mask)  # type: ignore[no-any-return]
        x_MBTSD = x_MBND.unflatten(2, (self.frames, -1))
        mask_BTS = None if mask is None else mask.unflatten(1, (self.frames, -1))
        by_frame = None if mask_BTS is None else mask_BTS.flatten(0, 1)
        s_MBTSD = self.token[layer](x_MBTSD.flatten(1, 2), by_frame).view_as(x_MBTSD)
        seen_MBTSD = x_MBTSD if self.order == "parallel" else x_MBTSD + s_MBTSD
        return (s_MBTSD + self.time[layer](seen_MBTSD, mask_BTS)).flatten(2, 3)  # type: ignore[no-any-return]


class ChannelMixer(MemberModule):
    """C(X) = a * GELU(X W_down) W_up: the same two matrices at every token."""

    def __init__(self, members: int, width: int, rank: int, a: float) -> None:
        super().__init__()
        self.a = a
        self.down_MDR = nn.Parameter(torch.zeros(members, width, rank))
        self.up_MRD = nn.Parameter(torch.zeros(members, rank, width))

    def start_member(self, member: int, keyed: torch.Generator) -> None:
        """Down normal with std 1/sqrt(D), up zero."""
        normal_start(self.down_MDR, member, self.down_MDR.shape[1], keyed)

    def forward(self, x_MBND: Tensor) -> Tensor:
        """(M, B, N, D) -> (M, B, N, D)."""
        code = self.a * F.gelu(torch.bmm(x_MBND.flatten(1, 2), self.down_MDR))
        return torch.bmm(code, self.up_MRD).view_as(x_MBND)


class TokenMixer(MemberModule):
    """T(X) = a * W_up GELU(W_down X): the same two matrices at every channel. Tied to N."""

    def __init__(self, members: int, num_tokens: int, rank: int, a: float) -> None:
        super().__init__()
        self.a = a
        self.down_MRN = nn.Parameter(torch.zeros(members, rank, num_tokens))
        self.up_MNR = nn.Parameter(torch.zeros(members, num_tokens, rank))

    def start_member(self, member: int, keyed: torch.Generator) -> None:
        """Down normal with std 1/sqrt(N), up zero."""
        normal_start(self.down_MRN, member, self.down_MRN.shape[2], keyed)

    def forward(self, x_MBND: Tensor, mask: Tensor | None) -> Tensor:
        """(M, B, N, D) -> (M, B, N, D); masked tokens are read as zero."""
        if mask is not None:
            x_MBND = x_MBND * mask[:, :, None].to(x_MBND.dtype)
        code = self.a * F.gelu(torch.matmul(self.down_MRN[:, None], x_MBND))
        return torch.matmul(self.up_MNR[:, None], code)


class TimeMixer(MemberModule):
    """Time(X) = a * (Wt_up GELU(Wt_down (X Wd_down))) Wd_up: frames are mixed R channels wide. Tied to T."""

    def __init__(self, members: int, frames: int, width: int, rank: int, a: float) -> None:
        super().__init__()
        self.a, over_time = a, min(rank, frames)
        self.down_MDR = nn.Parameter(torch.zeros(members, width, rank))
        self.time_down_MQT = nn.Parameter(torch.zeros(members, over_time, frames))
        self.time_up_MTQ = nn.Parameter(torch.zeros(members, frames, over_time))
        self.up_MRD = nn.Parameter(torch.zeros(members, rank, width))

    def start_member(self, member: int, keyed: torch.Generator) -> None:
        """All normal with std 1/sqrt(fan in) but the last up, which is zero: with two nothing would learn."""
        for parameter in (self.down_MDR, self.time_down_MQT, self.time_up_MTQ):
            fan_in = parameter.shape[1 if parameter is self.down_MDR else 2]
            normal_start(parameter, member, fan_in, keyed)

    def forward(self, x_MBTSD: Tensor, mask: Tensor | None) -> Tensor:
        """(M, B, T, S, D) -> (M, B, T, S, D); masked tokens are read as zero."""
        if mask is not None:
            x_MBTSD = x_MBTSD * mask[..., None].to(x_MBTSD.dtype)
        z_MBTSR = torch.bmm(x_MBTSD.flatten(1, 3), self.down_MDR).unflatten(1, x_MBTSD.shape[1:4])
        code_MBQX = F.gelu(torch.matmul(self.time_down_MQT[:, None], z_MBTSR.flatten(3)))
        u_MBTX = self.a * torch.matmul(self.time_up_MTQ[:, None], code_MBQX)
        u_MXR = u_MBTX.unflatten(3, (-1, z_MBTSR.shape[-1])).flatten(1, 3)
        return torch.bmm(u_MXR, self.up_MRD).view_as(x_MBTSD)

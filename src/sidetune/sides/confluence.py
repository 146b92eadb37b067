"""Confluence, our own side network: LoSA, its places spoken in frequencies.

    y_0 = b_L;  y_l = y_{l-1} + C_l(h) + T_l(h + C_l(h)),  h = b_l + y_{l-1}          tokens = y_L
    T_l(X) = Phi^T W_up GELU(W_down Phi X)            W_down (R, Q)  W_up (Q, R)  Phi (Q, N)

Phi has a row for each prefix token and one for each of the lowest frequencies of the grid (a discrete
cosine transform, DCT-II, orthonormal): no parameter is tied to N, and what is learnt of places is smooth.
Ridge may answer beside it: ``head.ridge``, `sidetune.blend`.

No paper: docs/explanation/design.md has the reasons, docs/log.md what else was tried. Textbook and fast
form are LoSA's, to which only the two matrices of a token mixer are new.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sidetune.features import Features, Spec, Tap
from sidetune.keyed import Draws
from sidetune.sides.base import Form, MemberModule, Pool, Side, SideRecipe, normal_start
from sidetune.sides.losa import Losa


class ConfluenceRecipe(SideRecipe):
    """Confluence's dials. See `Confluence`."""

    name: Literal["confluence"] = "confluence"
    rank: int = Field(8, ge=1)
    pool: Pool = "mean"
    frequencies: int = Field(6, ge=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    form: Form = "fast"


class Confluence(Side):
    """LoSA over the block taps, its token mixers in frequencies.

    Parameters a member: 2 * R * L * (D + Q), Q = prefix tokens + product of min(frequencies, axis) over the
    axes of the grid.

    Args:
        spec: taps; the blocks of one width and grid.
        rank: R of both mixers.
        members: M.
        pool: see `Side`.
        frequencies: of each axis of the grid, the lowest ones.
        drop_path: probability that a sample skips a layer's mixers in training.
        form: ``fast`` or ``textbook``: the same outputs and gradients.

    `drop_path` may be one rate a member.

    Raises:
        SideError: as `Losa`.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        rank: int = 8,
        members: int = 1,
        pool: Pool = "mean",
        frequencies: int = 6,
        drop_path: float | Sequence[float] = 0.0,
        form: Form = "fast",
    ) -> None:
        super().__init__(spec, members=members, pool=pool)

        def mixer(members: int, num_tokens: int, rank: int, a: float) -> FrequencyMixer:
            return FrequencyMixer(members, token_basis(spec.last, frequencies), rank, a)

        self.losa = Losa(
            spec, rank=rank, members=members, pool=pool, drop_path=drop_path, form=form, token_mixer=mixer
        )
        self.form = form
        # one scale, that of this side: kept once, and handed over at each call
        self.losa.register_buffer("tap_scale", self.tap_scale, persistent=False)

    def forward(self, features: Features, draws: Draws | None = None) -> Tensor:
        """See `Side.forward`."""
        pooled: Tensor = self._handed_over()(features, draws)
        return pooled

    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """y_L: (M, B, N, D), in the textbook form."""
        return self._handed_over().tokens(features, draws)

    def _handed_over(self) -> Losa:
        self.losa.tap_scale, self.losa.members = self.tap_scale, self.members
        return self.losa


class FrequencyMixer(MemberModule):
    """T(X) = a * Phi^T W_up GELU(W_down Phi X). It gives the two matrices of a `TokenMixer`."""

    basis_QN: Tensor

    def __init__(self, members: int, basis_QN: Tensor, rank: int, a: float) -> None:
        super().__init__()
        self.a = a
        self.register_buffer("basis_QN", basis_QN, persistent=False)
        self.down_MRQ = nn.Parameter(torch.zeros(members, rank, len(basis_QN)))
        self.up_MQR = nn.Parameter(torch.zeros(members, len(basis_QN), rank))

    def start_member(self, member: int, keyed: torch.Generator) -> None:
        """Down normal with std 1/sqrt(Q), up zero."""
        normal_start(self.down_MRQ, member, self.down_MRQ.shape[2], keyed)

    @property
    def down_MRN(self) -> Tensor:  # noqa: N802 - LoSA's forms read it by this name
        """W_down Phi: (M, R, N)."""
        return self.down_MRQ @ self.basis_QN

    @property
    def up_MNR(self) -> Tensor:  # noqa: N802 - likewise
        """Phi^T W_up: (M, N, R)."""
        return self.basis_QN.mT @ self.up_MQR

    def forward(self, x_MBND: Tensor, mask: Tensor | None) -> Tensor:
        """(M, B, N, D) -> (M, B, N, D); masked tokens are read as zero."""
        if mask is not None:
            x_MBND = x_MBND * mask[:, :, None].to(x_MBND.dtype)
        code = self.a * F.gelu(torch.matmul(self.down_MRN[:, None], x_MBND))
        return torch.matmul(self.up_MNR[:, None], code)


def token_basis(tap: Tap, frequencies: int) -> Tensor:
    """Phi, (Q, N), its rows orthonormal: each prefix token, then the grid's lowest frequencies.

    Args:
        tap: whose tokens.
        frequencies: of each axis of the grid, at most its length.
    """
    places = torch.arange(tap.num_tokens, device="cpu").view(tap.num_units, -1)
    prefix, patches = places[:, : tap.num_prefix].flatten(), places[:, tap.num_prefix :].flatten()
    waves = torch.ones(1, 1, device="cpu")
    for length in tap.grid:
        waves = torch.kron(waves, cosines(length)[:frequencies])
    basis_QN = torch.zeros(len(prefix) + len(waves), tap.num_tokens, device="cpu")
    basis_QN[torch.arange(len(prefix), device="cpu"), prefix] = 1.0
    basis_QN[len(prefix) :, patches] = waves
    return basis_QN


def cosines(length: int) -> Tensor:
    """The orthonormal DCT-II: (length, length), the lowest frequency first."""
    places = torch.arange(length, dtype=torch.float64, device="cpu")
    waves = torch.cos(math.pi * places[:, None] * (places + 0.5) / length)
    waves /= waves.norm(dim=1, keepdim=True)
    return waves.float()

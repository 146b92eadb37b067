"""The matrices of all mixers of a LoSA, as `sidetune.sides.losa_fast` reads them; and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from sidetune.sides.base import every
from sidetune.sides.chunks import of_rows

if TYPE_CHECKING:
    from sidetune.sides.losa import Losa

Kind = Literal["channel", "token", "time"]
Pair = tuple[Kind, Kind]
Piece = tuple[slice, slice]  # which members, which rows of the batch


def same_axis(kind: Kind, other: Kind) -> bool:
    """Whether mixers of two kinds contract the same axis: channel and time contract D, token N."""
    return (kind == "token") == (other == "token")


def same_axis_pairs(kinds: Sequence[Kind]) -> list[Pair]:
    """Which mixers' codes meet which mixers through a product of matrices alone."""
    return [(kind, other) for kind, other in product(kinds, kinds) if same_axis(kind, other)]


@dataclass(frozen=True)
class Mixers:
    """Of every kind, all layers stacked; or the gradients of the same.

    Args:
        down_MJY: what contracts Y.
        up_MJY: what writes Y; a token mixer's with the scale a.
        gram_MQJJ: of two kinds that contract the same axis, the down of one times the up of the other,
            masked tokens left out: what a mixer makes of codes. Q = 1, or B for token mixers where tokens are
            masked.
        over_time: of time mixers, which mix frames between the two: (M, L, Q, T) and, with the scale a,
            (M, L, T, Q); none of images.
    """

    down_MJY: dict[Kind, Tensor]
    up_MJY: dict[Kind, Tensor]
    gram_MQJJ: dict[Pair, Tensor]
    over_time: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in an order of their own."""
        parts = (self.down_MJY, self.up_MJY, self.gram_MQJJ)
        return [*(tensor for part in parts for tensor in part.values()), *self.over_time]

    @classmethod
    def build(cls, kinds: Sequence[Kind], tensors: Sequence[Tensor]) -> Self:
        """Of these kinds, in the order of `tensors`."""
        rest = iter(tensors)
        down, up = ({kind: next(rest) for kind in kinds} for _ in range(2))
        return cls(down, up, {pair: next(rest) for pair in same_axis_pairs(kinds)}, tuple(rest))

    def zeros(self) -> Mixers:
        """Room for gradients."""
        return Mixers.build([*self.down_MJY], [torch.zeros_like(tensor) for tensor in self.tensors])

    def part(self, piece: Piece) -> Mixers:
        """What some members have for some rows of the batch; views."""
        members, rows = piece
        down, up = (
            {kind: one[members] for kind, one in part.items()} for part in (self.down_MJY, self.up_MJY)
        )
        gram = {pair: of_rows(one[members], 1, rows) for pair, one in self.gram_MQJJ.items()}
        return Mixers(down, up, gram, tuple(one[members] for one in self.over_time))

    def add(self, other: Mixers) -> None:
        """Add others to these in place."""
        for into, one in zip(self.tensors, other.tensors, strict=True):
            into.add_(one)


def mixers_of(side: Losa, kinds: Sequence[Kind], mask_BN: Tensor | None) -> Mixers:
    """The matrices of a side; gradients of these reach its parameters.

    Args:
        side: whose they are.
        kinds: that it has.
        mask_BN: 1 where token mixers read a token, else 0; None: they read all.
    """
    matrices = {kind: _stacked(side, kind) for kind in kinds}
    down = {kind: one[0] for kind, one in matrices.items()}
    up = {kind: one[1] for kind, one in matrices.items()}
    read = {kind: one[:, None] for kind, one in down.items()}
    if mask_BN is not None and "token" in read:
        read["token"] = read["token"] * mask_BN[:, None]
    gram = {(a, b): read[a] @ up[b].mT[:, None] for a, b in same_axis_pairs(kinds)}
    if "time" not in kinds:
        return Mixers(down, up, gram)
    time_down, time_up = (torch.stack(every(side.time, name), 1) for name in ("time_down_MQT", "time_up_MTQ"))
    return Mixers(down, up, gram, (time_down, time_up * side.a))


def _stacked(side: Losa, kind: Kind) -> tuple[Tensor, Tensor]:
    """Down and up of a kind, (M, J, Y) each."""
    if kind == "token":
        down_MJN = torch.cat(every(side.token, "down_MRN"), 1)
        return down_MJN, torch.cat(every(side.token, "up_MNR"), 2).mT.contiguous() * side.a
    mixers = side.channel if kind == "channel" else side.time
    return torch.cat(every(mixers, "down_MDR"), 2).mT.contiguous(), torch.cat(every(mixers, "up_MRD"), 1)

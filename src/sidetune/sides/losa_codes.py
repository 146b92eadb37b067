"""The codes of some members of factored LoSA on a chunk: what finished mixers make of later ones.

See `sidetune.sides.losa_fast`, whose names are used here. A mixer contracts an axis Y and keeps X; codes
stand as (M, J, C, X) and ups as (M, J, Y), J = L*R, so that a product of all samples of a member is one
product of two matrices. A product of R rows is thin. Layers are therefore worked on in blocks: what earlier
blocks make of a block is one product of all its rows, and only within a block it goes layer by layer, all
members at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sidetune.sides.chunks import Scratch, of_rows
from sidetune.sides.products import add_times_transposed, each_times_transposed

if TYPE_CHECKING:
    from sidetune.sides.losa_fast import Call, Kind, Piece


class Block(NamedTuple):
    """Layers ``first`` .. ``end - 1``, and their codes ``begin`` .. ``stop - 1`` of J."""

    first: int
    end: int
    begin: int
    stop: int


class Codes:
    """Some members on C samples: all that their codes and their matrices make of each other.

    Args:
        call: what all chunks share.
        arguments: of the GELUs, of each kind: (M, J, C, X), written by `mix`.
        piece: which of the call's members, which rows of the batch.
        scratch: where codes stand.
    """

    def __init__(self, call: Call, arguments: dict[Kind, Tensor], piece: Piece, scratch: Scratch) -> None:
        members, rows = piece
        self.call, self.arguments, self.scratch = call, arguments, scratch
        self.size = rows.stop - rows.start
        self.kinds, self.rank = call.frozen.kinds, call.rank
        self.up_MJY = {kind: one.up_MJY[members] for kind, one in call.mixers.items()}
        self.down_MJY = {kind: one.down_MJY[members] for kind, one in call.mixers.items()}
        self.gram_MQJJ = {kind: of_rows(one.gram_MQJJ[members], 1, rows) for kind, one in call.mixers.items()}
        keep_LMB, mask_BN = call.frozen.keep_LMB, call.frozen.mask_BN
        self.keep_LMC = None if keep_LMB is None else keep_LMB[:, members, rows]
        self.mask_CN = None if mask_BN is None else mask_BN[rows]
        pool_QPN = of_rows(call.frozen.pool_QPN, 0, rows)
        self.pool, self.q = (pool_QPN[0], "") if len(pool_QPN) == 1 else (pool_QPN, "c")
        self.codes = {kind: self.room(f"codes/{kind}", kind) for kind in self.kinds}
        self.masked: Tensor | None = None
        if self.mask_CN is not None and "token" in self.kinds:
            self.masked = self.room("masked", "channel")

    def room(self, name: str, kind: Kind) -> Tensor:
        """Scratch of the shape of a kind's codes."""
        return self.scratch.take(name, self.arguments[kind].shape, self.arguments[kind])

    def again(self) -> None:
        """The codes from the arguments that are kept; drop-path is not in them."""
        for kind in self.kinds:
            self._activate(kind, slice(0, self.call.codes))

    def begin(self, kind: Kind, block: Block) -> None:
        """Add to the arguments of a block what its mixers make of the codes of earlier blocks."""
        seen = slice(0, block.begin)
        self._add_seen(kind, slice(block.begin, block.stop), seen, seen)

    def mix(self, kind: Kind, layer: int, block: Block) -> None:
        """Add what a mixer makes of the codes of its own block. Then its codes."""
        first = layer * self.rank
        own = slice(first, first + self.rank)
        self._add_seen(kind, own, slice(block.begin, first), slice(block.begin, self.seen_end(kind, first)))
        self._activate(kind, own)

    def drop(self, layer: int) -> None:
        """What later layers see of a layer that drop-path skips."""
        if self.keep_LMC is None:
            return
        own = slice(layer * self.rank, (layer + 1) * self.rank)
        for kind in self.kinds:
            self.codes[kind][:, own] *= self.keep_LMC[layer][:, None, :, None]
            self._mask(kind, own)

    def pooled(self, first_CND: Tensor | None) -> Tensor:
        """pool(y_0) + pool(H) U + pool(V) G: (M, C, P, D)."""
        pooled = torch.einsum(f"{self.q}pn,mjcn->mjcp", self.pool, self.codes["channel"])
        out_MCPD = torch.einsum("mjcp,mjd->mcpd", pooled, self.up_MJY["channel"])
        if "token" in self.kinds:
            pooled = torch.einsum(f"{self.q}pn,mjn->m{self.q}pj", self.pool, self.up_MJY["token"])
            out_MCPD = out_MCPD + torch.einsum(f"m{self.q}pj,mjcd->mcpd", pooled, self.codes["token"])
        if first_CND is not None:
            out_MCPD = out_MCPD + torch.einsum(f"{self.q}pn,cnd->cpd", self.pool, first_CND)
        return out_MCPD

    def _add_seen(self, kind: Kind, own: slice, same: slice, others: slice) -> None:
        """Add to arguments what W makes of codes: (W same_up^T) same + (W other^T) other_up."""
        into_MjCX = self.arguments[kind][:, own]
        if same.stop > same.start:
            add_own(into_MjCX, self.gram_MQJJ[kind][:, :, own, same], self.codes[kind][:, same])
        other = self.call.other(kind)
        if other is not None and others.stop > others.start:
            code_MSj = by_sample(self.code(kind, own, others))
            add_times_transposed(into_MjCX.flatten(1, 2), code_MSj, self.up_MJY[other][:, others].mT)

    def code(self, kind: Kind, own: slice, others: slice) -> Tensor:
        """W_down of some mixers times codes of the other kind: (M, j, j', C)."""
        codes_MSY = self.read(kind)[:, others].flatten(1, 2)
        code_MjS = each_times_transposed(self.down_MJY[kind][:, own], codes_MSY)
        return code_MjS.view(*code_MjS.shape[:2], -1, self.size)

    def read(self, kind: Kind) -> Tensor:
        """The codes of the other kind, as a mixer contracts them: a token mixer reads no masked token."""
        other = self.call.other(kind)
        assert other is not None
        codes: Tensor = self.codes[other]
        return self.masked if kind == "token" and self.masked is not None else codes

    def _mask(self, kind: Kind, own: slice) -> None:
        if kind == "channel" and self.masked is not None and self.mask_CN is not None:
            torch.mul(self.codes[kind][:, own], self.mask_CN, out=self.masked[:, own])

    def seen_end(self, kind: Kind, first: int) -> int:
        """Where the other kind's codes end that are finished when the mixer at `first` runs."""
        return first + self.call.sees_own(kind) * self.rank

    def _activate(self, kind: Kind, own: slice) -> None:
        """From arguments to codes."""
        codes = self.codes[kind][:, own]
        torch.ops.aten.gelu.out(self.arguments[kind][:, own], out=codes)
        if kind == "channel" and self.call.frozen.a != 1:  # a token mixer's a stands in its ups
            codes.mul_(self.call.frozen.a)
        self._mask(kind, own)


def add_own(into_MjCX: Tensor, gram_MQjj: Tensor, codes_MjCX: Tensor) -> None:
    """Add what mixers make of codes of their own kind, or the gradient of that."""
    if gram_MQjj.shape[1] > 1:
        into_MjCX += torch.einsum("mcij,mjcx->micx", gram_MQjj, codes_MjCX)
    else:
        add_times_transposed(into_MjCX.flatten(2), gram_MQjj[:, 0], codes_MjCX.flatten(2).mT)


def by_sample(code_MjjC: Tensor) -> Tensor:
    """A row for each mixer and sample: (M, j*C, j')."""
    return code_MjjC.transpose(2, 3).flatten(1, 2)

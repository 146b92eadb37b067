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
import torch.nn.functional as F
from torch import Tensor

from sidetune.sides.chunks import Scratch, of_rows
from sidetune.sides.losa_mixers import Kind, Mixers, Piece, same_axis
from sidetune.sides.products import add_times_transposed, each_times_transposed

if TYPE_CHECKING:
    from sidetune.sides.losa_fast import Call


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
        arguments: of the GELUs, of each kind: (M, J, C, X), written by `mix`; of time mixers what they mix.
        piece: which of the call's members, which rows of the batch.
        scratch: where codes stand.
    """

    def __init__(self, call: Call, arguments: dict[Kind, Tensor], piece: Piece, scratch: Scratch) -> None:
        members, rows = piece
        self.call, self.arguments, self.scratch = call, arguments, scratch
        self.size = rows.stop - rows.start
        self.kinds, self.rank = call.frozen.kinds, call.rank
        self.mixers: Mixers = call.mixers.part(piece)
        keep_LMB, mask_BN = call.frozen.keep_LMB, call.frozen.mask_BN
        self.keep_LMC = None if keep_LMB is None else keep_LMB[:, members, rows]
        self.mask_CN = None if mask_BN is None else mask_BN[rows]
        pool_QPN = of_rows(call.frozen.pool_QPN, 0, rows)
        self.pool, self.q = (pool_QPN[0], "") if len(pool_QPN) == 1 else (pool_QPN, "c")
        self.codes = {kind: self.room(f"codes/{kind}", kind) for kind in self.kinds}
        self.masked: dict[Kind, Tensor] = {}
        if self.mask_CN is not None and "token" in self.kinds:
            self.masked = {kind: self.room(f"masked/{kind}", kind) for kind in self.of_tokens}

    @property
    def of_tokens(self) -> list[Kind]:
        """The kinds whose codes are a row a token: those that contract the width."""
        return [kind for kind in self.kinds if kind != "token"]

    def room(self, name: str, kind: Kind) -> Tensor:
        """Scratch of the shape of a kind's codes."""
        return self.scratch.take(name, self.arguments[kind].shape, self.arguments[kind])

    def again(self) -> None:
        """The codes from the arguments that are kept; drop-path is not in them."""
        for kind in self.kinds:
            self._activate(kind, slice(0, self.call.codes))

    def begin(self, kind: Kind, block: Block) -> None:
        """Add to the arguments of a block what its mixers make of the codes of earlier blocks."""
        for source in self.kinds:
            self._add_seen(kind, slice(block.begin, block.stop), source, slice(0, block.begin))

    def mix(self, kind: Kind, layer: int, block: Block) -> None:
        """Add what a mixer makes of the codes of its own block. Then its codes."""
        first = layer * self.rank
        own = slice(first, first + self.rank)
        for source in self.kinds:
            self._add_seen(kind, own, source, slice(block.begin, self.seen_end(kind, source, first)))
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
        up_MJY, outs = self.mixers.up_MJY, []
        for kind in self.of_tokens:
            pooled = torch.einsum(f"{self.q}pn,mjcn->mjcp", self.pool, self.codes[kind])
            outs.append(torch.einsum("mjcp,mjd->mcpd", pooled, up_MJY[kind]))
        if "token" in self.kinds:
            pooled = torch.einsum(f"{self.q}pn,mjn->m{self.q}pj", self.pool, up_MJY["token"])
            outs.append(torch.einsum(f"m{self.q}pj,mjcd->mcpd", pooled, self.codes["token"]))
        if first_CND is not None:
            outs.append(torch.einsum(f"{self.q}pn,cnd->cpd", self.pool, first_CND).expand_as(outs[0]))
        out_MCPD = outs[0]
        for one in outs[1:]:
            out_MCPD = out_MCPD + one
        return out_MCPD

    def _add_seen(self, kind: Kind, own: slice, source: Kind, seen: slice) -> None:
        """Add to arguments what W makes of codes: (W up^T) codes, or across axes (W codes^T) up."""
        if seen.stop <= seen.start:
            return
        into_MjCX = self.arguments[kind][:, own]
        if same_axis(kind, source):
            gram_MQjj = self.mixers.gram_MQJJ[kind, source][:, :, own, seen]
            add_own(into_MjCX, gram_MQjj, self.codes[source][:, seen])
            return
        code_MSj = by_sample(self.code(kind, own, source, seen))
        add_times_transposed(into_MjCX.flatten(1, 2), code_MSj, self.mixers.up_MJY[source][:, seen].mT)

    def code(self, kind: Kind, own: slice, source: Kind, seen: slice) -> Tensor:
        """W_down of some mixers times codes of a kind that contracts the other axis: (M, j, j', C)."""
        codes_MSY = self.read(kind, source)[:, seen].flatten(1, 2)
        code_MjS = each_times_transposed(self.mixers.down_MJY[kind][:, own], codes_MSY)
        return code_MjS.view(*code_MjS.shape[:2], -1, self.size)

    def read(self, kind: Kind, source: Kind) -> Tensor:
        """Codes as a mixer that contracts the other axis reads them: a token mixer no masked token's."""
        return self.masked[source] if kind == "token" and self.masked else self.codes[source]

    def _mask(self, kind: Kind, own: slice) -> None:
        if kind in self.masked and self.mask_CN is not None:
            torch.mul(self.codes[kind][:, own], self.mask_CN, out=self.masked[kind][:, own])

    def seen_end(self, kind: Kind, source: Kind, first: int) -> int:
        """Where a source's codes end that are finished when the mixer at `first` runs."""
        return first + self.call.sees_own(kind, source) * self.rank

    def _activate(self, kind: Kind, own: slice) -> None:
        """From arguments to codes."""
        codes = self.codes[kind][:, own]
        if kind == "time":
            codes.copy_(self._over_time(own))
        else:
            torch.ops.aten.gelu.out(self.arguments[kind][:, own], out=codes)
        if kind == "channel" and self.call.frozen.a != 1:  # the others' a stands in matrices of theirs
            codes.mul_(self.call.frozen.a)
        self._mask(kind, own)

    def _over_time(self, own: slice) -> Tensor:
        """W_up GELU(W_down z) over the frames of a clip."""
        down, up = self.time_matrices(own)
        u_MlRcTN: Tensor = up @ F.gelu(down @ self.bottleneck(own))
        return u_MlRcTN.flatten(3, 4).flatten(1, 2)

    def time_matrices(self, own: slice) -> tuple[Tensor, Tensor]:
        """Of some layers' time mixers: (M, l, 1, 1, Q, T) and (M, l, 1, 1, T, Q)."""
        layers = slice(own.start // self.rank, own.stop // self.rank)
        down, up = (one[:, layers, None, None] for one in self.mixers.over_time)
        return down, up

    def bottleneck(self, own: slice) -> Tensor:
        """What these read, masked tokens as zero: (M, l, R, clips, T, N)."""
        z_MjCN = self.arguments["time"][:, own]
        return self.by_clip(z_MjCN if self.mask_CN is None else z_MjCN * self.mask_CN)

    def by_clip(self, z_MjCN: Tensor) -> Tensor:
        """(M, l, R, clips, T, N) of (M, j, C, N)."""
        z_MlRcTN: Tensor = z_MjCN.unflatten(2, (-1, self.call.frozen.frames)).unflatten(1, (-1, self.rank))
        return z_MlRcTN


def add_own(into_MjCX: Tensor, gram_MQjj: Tensor, codes_MjCX: Tensor) -> None:
    """Add what mixers make of codes that keep the same axis, or the gradient of that."""
    if gram_MQjj.shape[1] > 1:
        into_MjCX += torch.einsum("mcij,mjcx->micx", gram_MQjj, codes_MjCX)
    else:
        add_times_transposed(into_MjCX.flatten(2), gram_MQjj[:, 0], codes_MjCX.flatten(2).mT)


def by_sample(code_MjjC: Tensor) -> Tensor:
    """A row for each mixer and sample: (M, j*C, j')."""
    return code_MjjC.transpose(2, 3).flatten(1, 2)

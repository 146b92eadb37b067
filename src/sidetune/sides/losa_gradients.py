"""The way back through `sidetune.sides.losa_codes`: gradients of codes, of arguments and of the matrices.

A mixer's argument is W x + (W same_up^T) same + (W other^T) other_up over the codes that it sees; these
lines differentiated by hand, from the last block of layers to the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sidetune.sides.losa_codes import Block, Codes, add_own, by_sample
from sidetune.sides.products import add_times_transposed, each_times_transposed

if TYPE_CHECKING:
    from sidetune.sides.losa_fast import Kind


class Total(NamedTuple):
    """Gradients of one kind's matrices, which chunks add to.

    Args:
        down_MJY: of W_down.
        up_MJY: of W_up.
        gram_MQJJ: of their product; Q = 1, or C.
    """

    down_MJY: Tensor
    up_MJY: Tensor
    gram_MQJJ: Tensor


class CodeGradients:
    """Gradients of some members on C samples.

    Args:
        codes: with the arguments that forward wrote.
        total: of each kind, added to.
        d_out_MCPD: gradient of the pooled tokens.
    """

    def __init__(self, codes: Codes, total: dict[Kind, Total], d_out_MCPD: Tensor) -> None:
        codes.again()
        self.of, self.call, self.total = codes, codes.call, total
        self.dropped = {kind: self._drop(kind) for kind in codes.kinds}
        self.d_codes: dict[Kind, Tensor] = {}
        self._pooled(d_out_MCPD)
        self.d_arguments = {kind: codes.room(f"d_arguments/{kind}", kind) for kind in codes.kinds}
        self.d_code_MJJC = {
            kind: codes.scratch.take(f"d_code/{kind}", (len(one), *[self.call.codes] * 2, codes.size), one)
            for kind, one in codes.codes.items()
        }

    def begin(self, kind: Kind, block: Block) -> None:
        """Add to the gradients of a block's codes what comes from later blocks."""
        later = slice(block.stop, self.call.codes)
        self._add_later(kind, slice(block.begin, block.stop), later, later)

    def mix(self, kind: Kind, layer: int, block: Block) -> None:
        """The gradient of a mixer's argument, from those of all mixers that ran after it."""
        of, rank = self.of, self.call.rank
        first = layer * rank
        own, later = slice(first, first + rank), slice(first + rank, block.stop)
        other, d_codes = self.call.other(kind), self.d_codes[kind][:, own]
        is_seen = other is not None and self.call.sees_own(other)
        if of.keep_LMC is None:
            self._add_later(kind, own, later, slice(first, block.stop) if is_seen else later)
        else:  # the other mixer of the same layer sees what is not dropped yet
            self._add_later(kind, own, later, later)
            d_codes *= of.keep_LMC[layer][:, None, :, None]
            if is_seen:
                self._add_later(kind, own, slice(0, 0), own)
        d_argument = self.d_arguments[kind][:, own]
        torch.ops.aten.gelu_backward.grad_input(d_codes, of.arguments[kind][:, own], grad_input=d_argument)
        if kind == "channel" and self.call.frozen.a != 1:
            d_argument *= self.call.frozen.a
        if other is not None:
            end = of.seen_end(kind, first)
            self.d_code_MJJC[kind][:, own, end : block.stop] = 0.0
            self._keep_d_code(kind, own, slice(block.begin, end))

    def end(self, kind: Kind, block: Block) -> None:
        """Add to the gradients of a block's matrices, but for the part of W_down that meets x."""
        own, seen = slice(block.begin, block.stop), slice(0, block.stop)
        total, other = self.total[kind], self.call.other(kind)
        d_arguments, dropped = self.d_arguments[kind][:, own], self.dropped[kind][:, seen]
        if total.gram_MQJJ.shape[1] > 1:
            total.gram_MQJJ[:, :, own, seen] += torch.einsum("micx,mjcx->mcij", d_arguments, dropped)
        else:
            into = total.gram_MQJJ[:, 0, own, seen]
            add_times_transposed(into, d_arguments.flatten(2), dropped.flatten(2))
        if other is None:
            return
        self._keep_d_code(kind, own, slice(0, block.begin))
        factor = self._seen(kind, own, seen)
        d_code = self.d_code_MJJC[kind][:, own, seen]
        if self.of.keep_LMC is not None:
            d_code = d_code * factor
        codes_MSY = self.of.read(kind)[:, seen].flatten(1, 2)
        add_times_transposed(total.down_MJY[:, own], d_code.flatten(2), codes_MSY.mT)
        code_MSj = by_sample(self.of.code(kind, own, seen) * factor)
        d_up = self.total[other].up_MJY[:, seen]
        add_times_transposed(d_up, code_MSj.mT, d_arguments.flatten(1, 2).mT)

    def _pooled(self, d_out_MCPD: Tensor) -> None:
        """What reaches codes and ups through the pooled tokens."""
        of, q = self.of, self.of.q
        d_pooled = torch.einsum("mcpd,mjd->mjcp", d_out_MCPD, of.up_MJY["channel"])
        d_codes = of.room("d_codes/channel", "channel")
        if q:
            d_codes.copy_(torch.einsum("mjcp,cpn->mjcn", d_pooled, of.pool))
        else:
            torch.mm(d_pooled.flatten(0, 2), of.pool, out=d_codes.flatten(0, 2))
        self.d_codes["channel"] = d_codes
        pooled = torch.einsum(f"{q}pn,mjcn->mjcp", of.pool, self.dropped["channel"])
        self.total["channel"].up_MJY.add_(torch.einsum("mjcp,mcpd->mjd", pooled, d_out_MCPD))
        if "token" in of.kinds:
            self._pooled_tokens(d_out_MCPD)

    def _pooled_tokens(self, d_out_MCPD: Tensor) -> None:
        """Likewise of the token codes."""
        of, q = self.of, self.of.q
        d_codes, codes = of.room("d_codes/token", "token"), self.dropped["token"]
        pooled = torch.einsum(f"{q}pn,mjn->m{q}pj", of.pool, of.up_MJY["token"])
        if q:
            d_codes.copy_(torch.einsum("mcpj,mcpd->mjcd", pooled, d_out_MCPD))
            d_up = torch.einsum("mcpd,mjcd,cpn->mjn", d_out_MCPD, codes, of.pool)
        else:  # plain products: einsum would write the codes once more in another order
            d_out_MPS = d_out_MCPD.transpose(1, 2).flatten(2)
            torch.bmm(pooled.mT, d_out_MPS, out=d_codes.flatten(2))
            d_up = torch.bmm(codes.flatten(2), d_out_MPS.mT) @ of.pool
        self.d_codes["token"] = d_codes
        self.total["token"].up_MJY.add_(d_up)

    def _add_later(self, kind: Kind, own: slice, same: slice, others: slice) -> None:
        """Add to gradients of codes those of arguments to which they contribute."""
        into_MjCX, of = self.d_codes[kind][:, own], self.of
        if same.stop > same.start:
            gram_MQjj = of.gram_MQJJ[kind][:, :, same, own].mT
            add_own(into_MjCX, gram_MQjj, self.d_arguments[kind][:, same])
        other = self.call.other(kind)
        if other is None or others.stop <= others.start:
            return
        d_code_MSj = self.d_code_MJJC[other][:, others, own].flatten(2).mT
        down_MXj = of.down_MJY[other][:, others].mT
        if other == "token" and of.mask_CN is not None:
            read = each_times_transposed(d_code_MSj, down_MXj)
            into_MjCX += read.view(into_MjCX.shape) * of.mask_CN
        else:
            add_times_transposed(into_MjCX.flatten(1, 2), d_code_MSj, down_MXj)

    def _keep_d_code(self, kind: Kind, own: slice, others: slice) -> None:
        """The gradient of `Codes.code`."""
        other = self.call.other(kind)
        if other is None or others.stop <= others.start:
            return
        d_arguments_MSX = self.d_arguments[kind][:, own].flatten(1, 2)
        d_code_MSj = each_times_transposed(d_arguments_MSX, self.of.up_MJY[other][:, others])
        d_code_MjCj = d_code_MSj.unflatten(1, (-1, self.of.size))
        self.d_code_MJJC[kind][:, own, others] = d_code_MjCj.transpose(2, 3)

    def _seen(self, kind: Kind, own: slice, others: slice) -> Tensor:
        """What mixers see of the other kind's codes, as drop-path leaves it: (M or 1, j, j', C or 1)."""
        call, keep_LMC = self.call, self.of.keep_LMC
        seen_MjjC = call.earlier_JJ[own, others][None, :, :, None]
        if keep_LMC is not None:
            keep_LMC = keep_LMC.repeat_interleave(call.rank, 0)[others]
            seen_MjjC = seen_MjjC * keep_LMC.transpose(0, 1)[:, None]
        if call.sees_own(kind):
            seen_MjjC = seen_MjjC + call.same_JJ[own, others][None, :, :, None]
        return seen_MjjC

    def _drop(self, kind: Kind) -> Tensor:
        codes, keep_LMC = self.of.codes[kind], self.of.keep_LMC
        if keep_LMC is None:
            return codes
        return codes * keep_LMC.repeat_interleave(self.call.rank, 0).transpose(0, 1)[..., None]

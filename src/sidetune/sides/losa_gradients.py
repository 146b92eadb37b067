"""The way back through `sidetune.sides.losa_codes`: gradients of codes, of arguments and of the matrices.

A mixer's argument is W x and, of every kind whose codes it sees, (W up^T) codes where both contract the same
axis, else (W codes^T) up; these lines differentiated by hand, from the last block of layers to the first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sidetune.sides.losa_codes import Block, Codes, add_own, by_sample
from sidetune.sides.losa_mixers import Kind, Mixers, Pair, same_axis
from sidetune.sides.products import add_times_transposed, each_times_transposed


class CodeGradients:
    """Gradients of some members on C samples.

    Args:
        codes: with the arguments that forward wrote.
        total: of the matrices of these members, added to.
        d_out_MCPD: gradient of the pooled tokens.
    """

    def __init__(self, codes: Codes, total: Mixers, d_out_MCPD: Tensor) -> None:
        codes.again()
        self.of, self.call, self.total, self.mixers = codes, codes.call, total, codes.mixers
        self.dropped = {kind: self._drop(kind) for kind in codes.kinds}
        self.d_codes: dict[Kind, Tensor] = {}
        self._pooled(d_out_MCPD)
        self.d_arguments = {kind: codes.room(f"d_arguments/{kind}", kind) for kind in codes.kinds}
        self.d_code_MJJC: dict[Pair, Tensor] = {
            (kind, source): codes.scratch.take(
                f"d_code/{kind}/{source}", (len(one), *[self.call.codes] * 2, codes.size), one
            )
            for kind, one in codes.codes.items()
            for source in codes.kinds
            if not same_axis(kind, source)
        }

    def begin(self, kind: Kind, block: Block) -> None:
        """Add to the gradients of a block's codes what comes from later blocks."""
        own, later = slice(block.begin, block.stop), slice(block.stop, self.call.codes)
        for reader in self.of.kinds:
            self._add_later(kind, own, reader, later)

    def mix(self, kind: Kind, layer: int, block: Block) -> None:
        """The gradient of a mixer's argument, from those of all mixers that ran after it."""
        of, rank = self.of, self.call.rank
        first = layer * rank
        own, later = slice(first, first + rank), slice(first + rank, block.stop)
        d_codes = self.d_codes[kind][:, own]
        readers = [one for one in of.kinds if self.call.sees_own(one, kind)]
        for reader in of.kinds:
            at_once = of.keep_LMC is None and reader in readers
            self._add_later(kind, own, reader, slice(first if at_once else later.start, block.stop))
        if of.keep_LMC is not None:  # other mixers of the same layer see what is not dropped yet
            d_codes *= of.keep_LMC[layer][:, None, :, None]
            for reader in readers:
                self._add_later(kind, own, reader, own)
        self._deactivate(kind, own, d_codes)
        for source in of.kinds:
            if not same_axis(kind, source):
                end = of.seen_end(kind, source, first)
                self.d_code_MJJC[kind, source][:, own, end : block.stop] = 0.0
                self._keep_d_code(kind, own, source, slice(block.begin, end))

    def end(self, kind: Kind, block: Block) -> None:
        """Add to the gradients of a block's matrices, but for the part of W_down that meets x."""
        own, seen = slice(block.begin, block.stop), slice(0, block.stop)
        for source in self.of.kinds:
            if same_axis(kind, source):
                self._end_same(kind, source, own, seen)
            else:
                self._keep_d_code(kind, own, source, slice(0, block.begin))
                self._end_other(kind, source, own, seen)

    def _end_same(self, kind: Kind, source: Kind, own: slice, seen: slice) -> None:
        gram_MQJJ, d_arguments = self.total.gram_MQJJ[kind, source], self.d_arguments[kind]
        dropped = self.dropped[source][:, seen]
        if gram_MQJJ.shape[1] > 1:
            gram_MQJJ[:, :, own, seen] += torch.einsum("micx,mjcx->mcij", d_arguments[:, own], dropped)
        else:
            into = gram_MQJJ[:, 0, own, seen]
            add_times_transposed(into, d_arguments[:, own].flatten(2), dropped.flatten(2))
        if self.of.keep_LMC is None or not self.call.sees_own(kind, source):
            return
        for first in range(own.start, own.stop, self.call.rank):  # of its own layer nothing is dropped yet
            layer = slice(first, first + self.call.rank)
            undropped = (self.of.codes[source][:, layer] - self.dropped[source][:, layer]).flatten(2)
            gram_MQJJ[:, 0, layer, layer].baddbmm_(d_arguments[:, layer].flatten(2), undropped.mT)

    def _end_other(self, kind: Kind, source: Kind, own: slice, seen: slice) -> None:
        factor = self._seen(kind, source, own, seen)
        d_code = self.d_code_MJJC[kind, source][:, own, seen]
        if self.of.keep_LMC is not None:
            d_code = d_code * factor
        codes_MSY = self.of.read(kind, source)[:, seen].flatten(1, 2)
        add_times_transposed(self.total.down_MJY[kind][:, own], d_code.flatten(2), codes_MSY.mT)
        code_MSj = by_sample(self.of.code(kind, own, source, seen) * factor)
        d_up, d_arguments = self.total.up_MJY[source][:, seen], self.d_arguments[kind][:, own]
        add_times_transposed(d_up, code_MSj.mT, d_arguments.flatten(1, 2).mT)

    def _pooled(self, d_out_MCPD: Tensor) -> None:
        """What reaches codes and ups through the pooled tokens."""
        of, q = self.of, self.of.q
        for kind in of.of_tokens:
            d_pooled = torch.einsum("mcpd,mjd->mjcp", d_out_MCPD, self.mixers.up_MJY[kind])
            d_codes = of.room(f"d_codes/{kind}", kind)
            if q:
                d_codes.copy_(torch.einsum("mjcp,cpn->mjcn", d_pooled, of.pool))
            else:
                torch.mm(d_pooled.flatten(0, 2), of.pool, out=d_codes.flatten(0, 2))
            self.d_codes[kind] = d_codes
            pooled = torch.einsum(f"{q}pn,mjcn->mjcp", of.pool, self.dropped[kind])
            self.total.up_MJY[kind].add_(torch.einsum("mjcp,mcpd->mjd", pooled, d_out_MCPD))
        if "token" in of.kinds:
            self._pooled_tokens(d_out_MCPD)

    def _pooled_tokens(self, d_out_MCPD: Tensor) -> None:
        """Likewise of the token codes."""
        of, q = self.of, self.of.q
        d_codes, codes = of.room("d_codes/token", "token"), self.dropped["token"]
        pooled = torch.einsum(f"{q}pn,mjn->m{q}pj", of.pool, self.mixers.up_MJY["token"])
        if q:
            d_codes.copy_(torch.einsum("mcpj,mcpd->mjcd", pooled, d_out_MCPD))
            d_up = torch.einsum("mcpd,mjcd,cpn->mjn", d_out_MCPD, codes, of.pool)
        else:  # plain products: einsum would write the codes once more in another order
            d_out_MPS = d_out_MCPD.transpose(1, 2).flatten(2)
            torch.bmm(pooled.mT, d_out_MPS, out=d_codes.flatten(2))
            d_up = torch.bmm(codes.flatten(2), d_out_MPS.mT) @ of.pool
        self.d_codes["token"] = d_codes
        self.total.up_MJY["token"].add_(d_up)

    def _add_later(self, kind: Kind, own: slice, reader: Kind, later: slice) -> None:
        """Add to gradients of codes those of arguments to which they contribute."""
        if later.stop <= later.start:
            return
        into_MjCX, of = self.d_codes[kind][:, own], self.of
        if same_axis(kind, reader):
            gram_MQjj = self.mixers.gram_MQJJ[reader, kind][:, :, later, own].mT
            add_own(into_MjCX, gram_MQjj, self.d_arguments[reader][:, later])
            return
        d_code_MSj = self.d_code_MJJC[reader, kind][:, later, own].flatten(2).mT
        down_MXj = self.mixers.down_MJY[reader][:, later].mT
        if reader == "token" and of.mask_CN is not None:
            read = each_times_transposed(d_code_MSj, down_MXj)
            into_MjCX += read.view(into_MjCX.shape) * of.mask_CN
        else:
            add_times_transposed(into_MjCX.flatten(1, 2), d_code_MSj, down_MXj)

    def _deactivate(self, kind: Kind, own: slice, d_codes: Tensor) -> None:
        """From gradients of codes to those of arguments."""
        d_argument = self.d_arguments[kind][:, own]
        if kind == "time":
            d_argument.copy_(self._over_time_backward(own, d_codes))
            return
        arguments = self.of.arguments[kind][:, own]
        torch.ops.aten.gelu_backward.grad_input(d_codes, arguments, grad_input=d_argument)
        if kind == "channel" and self.call.frozen.a != 1:
            d_argument *= self.call.frozen.a

    def _over_time_backward(self, own: slice, d_codes: Tensor) -> Tensor:
        """Through W_up GELU(W_down z), and the gradients of these two."""
        of, layers = self.of, slice(own.start // self.call.rank, own.stop // self.call.rank)
        (down, up), z = of.time_matrices(own), of.bottleneck(own)
        d_u, inner = of.by_clip(d_codes), down @ z
        d_inner = torch.ops.aten.gelu_backward(up.mT @ d_u, inner)
        d_down, d_up = (one[:, layers] for one in self.total.over_time)
        d_down += (d_inner @ z.mT).sum((2, 3))
        d_up += (d_u @ F.gelu(inner).mT).sum((2, 3))
        d_z: Tensor = (down.mT @ d_inner).flatten(3, 4).flatten(1, 2)
        return d_z if of.mask_CN is None else d_z * of.mask_CN

    def _keep_d_code(self, kind: Kind, own: slice, source: Kind, seen: slice) -> None:
        """The gradient of `Codes.code`."""
        if seen.stop <= seen.start:
            return
        d_arguments_MSX = self.d_arguments[kind][:, own].flatten(1, 2)
        d_code_MSj = each_times_transposed(d_arguments_MSX, self.mixers.up_MJY[source][:, seen])
        d_code_MjCj = d_code_MSj.unflatten(1, (-1, self.of.size))
        self.d_code_MJJC[kind, source][:, own, seen] = d_code_MjCj.transpose(2, 3)

    def _seen(self, kind: Kind, source: Kind, own: slice, seen: slice) -> Tensor:
        """What mixers see of a source's codes, as drop-path leaves it: (M or 1, j, j', C or 1)."""
        call, keep_LMC = self.call, self.of.keep_LMC
        seen_MjjC = call.earlier_JJ[own, seen][None, :, :, None]
        if keep_LMC is not None:
            keep_LMC = keep_LMC.repeat_interleave(call.rank, 0)[seen]
            seen_MjjC = seen_MjjC * keep_LMC.transpose(0, 1)[:, None]
        if call.sees_own(kind, source):
            seen_MjjC = seen_MjjC + call.same_JJ[own, seen][None, :, :, None]
        return seen_MjjC

    def _drop(self, kind: Kind) -> Tensor:
        codes, keep_LMC = self.of.codes[kind], self.of.keep_LMC
        if keep_LMC is None:
            return codes
        return codes * keep_LMC.repeat_interleave(self.call.rank, 0).transpose(0, 1)[..., None]

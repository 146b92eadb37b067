"""The codes of one member of factored LoSA on a chunk: what finished mixers make of later ones.

See `sidetune.sides.losa_fast`, whose names are used here: a mixer contracts an axis Y and keeps X, its codes
stand as (C, J, X) and its ups as (J, Y), J = L*R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sidetune.sides.chunks import of_rows

if TYPE_CHECKING:
    from sidetune.sides.losa_fast import Call, Kind


class MemberCodes:
    """One member on C samples: all that its codes and its matrices make of each other.

    Views of all layers are made at once: a view costs Python as much as one of the small products.
    """

    def __init__(self, call: Call, m: int, kept: dict[Kind, Tensor], rows: slice) -> None:
        self.call, self.size = call, rows.stop - rows.start
        pool_QPN, keep_LMB = call.frozen.pool_QPN, call.frozen.keep_LMB
        self.pool_CPN = of_rows(pool_QPN, 0, rows).expand(self.size, -1, -1)
        self.keep_CJ1: Tensor | None = None
        if keep_LMB is not None:
            self.keep_CJ1 = keep_LMB[:, m, rows].T.repeat_interleave(call.rank, 1)[..., None]
        each = (self.size, -1, -1)
        self.up_JY = {kind: one.up_MJY[m] for kind, one in call.mixers.items()}
        self.down_QJY = {kind: of_rows(one.down_MQJY[m], 0, rows) for kind, one in call.mixers.items()}
        self.gram_CJJ = {
            kind: of_rows(one.gram_MQJJ[m], 0, rows).expand(each) for kind, one in call.mixers.items()
        }
        self.down_CJY = {kind: down.expand(each) for kind, down in self.down_QJY.items()}
        self.arguments_LCRX = {kind: one[:, m, rows] for kind, one in kept.items()}
        self.arguments = {kind: one.unbind() for kind, one in self.arguments_LCRX.items()}
        self.codes_CJX = {
            kind: one.new_empty(self.size, call.codes, one.shape[-1])
            for kind, one in self.arguments_LCRX.items()
        }
        self.own_codes = {kind: self._by_layer(codes) for kind, codes in self.codes_CJX.items()}
        self.own_down = {kind: self._by_layer(down) for kind, down in self.down_CJY.items()}

    def mix(self, kind: Kind, layer: int, product_CRX: Tensor) -> None:
        """From W x to the argument of the GELU, which is kept, and the codes.

        What W makes of finished codes: (W same_up^T) same + (W other^T) other_up.
        """
        first = layer * self.call.rank
        argument_CRX = self.arguments[kind][layer].copy_(product_CRX)
        if first:
            gram_CRJ = self.gram_CJJ[kind].narrow(1, first, self.call.rank).narrow(2, 0, first)
            argument_CRX.baddbmm_(gram_CRJ, self.codes_CJX[kind].narrow(1, 0, first))
        other, seen = self._seen(kind, layer)
        if other is not None and seen:
            code_CRJ = torch.bmm(self.own_down[kind][layer], self.codes_CJX[other].narrow(1, 0, seen).mT)
            argument_CRX.flatten(0, 1).addmm_(code_CRJ.flatten(0, 1), self.up_JY[other].narrow(0, 0, seen))
        self.own_codes[kind][layer].copy_(self._codes(kind, argument_CRX))

    def drop(self, layer: int) -> None:
        """What later layers see of a layer that drop-path skips."""
        if self.keep_CJ1 is not None:
            for codes in self.own_codes.values():
                codes[layer].mul_(self.keep_CJ1[:, layer * self.call.rank, None])

    def pooled(self, first_CND: Tensor | None) -> Tensor:
        """pool(y_0) + pool(H) U + pool(V) G: (C, P, D)."""
        out_CPD = torch.bmm(self.pool_CPN, self.codes_CJX["channel"].mT) @ self.up_JY["channel"]
        if "token" in self.up_JY:
            out_CPD += torch.bmm(self.pool_CPN @ self.up_JY["token"].T, self.codes_CJX["token"])
        if first_CND is not None:
            out_CPD += torch.bmm(self.pool_CPN, first_CND)
        return out_CPD

    def begin_backward(self, d_out_CPD: Tensor) -> None:
        """The codes again, and the gradients that reach them through the pooled tokens alone."""
        kinds = self.call.frozen.kinds
        for kind in kinds:
            by_layer = self.codes_CJX[kind].unflatten(1, (self.call.layers, -1)).transpose(0, 1)
            by_layer.copy_(self._codes(kind, self.arguments_LCRX[kind]))
        self.dropped_CJX = {kind: self._drop(codes) for kind, codes in self.codes_CJX.items()}
        d_codes_CJX: dict[Kind, Tensor] = {
            "channel": torch.bmm((d_out_CPD @ self.up_JY["channel"].T).mT, self.pool_CPN)
        }
        pooled_CPJ = torch.bmm(self.pool_CPN, self.dropped_CJX["channel"].mT)
        self.d_up_JY = {"channel": pooled_CPJ.flatten(0, 1).T @ d_out_CPD.flatten(0, 1)}
        if "token" in self.up_JY:
            d_codes_CJX["token"] = torch.bmm((self.pool_CPN @ self.up_JY["token"].T).mT, d_out_CPD)
            d_pooled_CPJ = torch.bmm(d_out_CPD, self.dropped_CJX["token"].mT)
            self.d_up_JY["token"] = torch.bmm(d_pooled_CPJ.mT, self.pool_CPN).sum(0)
        self.d_out_codes = {kind: self._by_layer(d_codes_CJX[kind]) for kind in kinds}
        self.d_arguments_CJX = {kind: torch.empty_like(self.codes_CJX[kind]) for kind in kinds}
        self.own_d_arguments = {kind: self._by_layer(one) for kind, one in self.d_arguments_CJX.items()}
        self.d_code_CJJ = {kind: torch.zeros_like(self.gram_CJJ[kind]) for kind in kinds}
        self.seen_CJJ = {kind: self._seen_codes(kind) for kind in kinds}

    def mix_backward(self, kind: Kind, layer: int) -> Tensor:
        """The gradient of a mixer's argument, (C, R, X), from those of all mixers that ran after it."""
        rank, codes = self.call.rank, self.call.codes
        first, later = layer * rank, (layer + 1) * rank
        d_codes_CRX = self.d_out_codes[kind][layer]
        if later < codes:
            gram_CRJ = self.gram_CJJ[kind].narrow(2, first, rank).narrow(1, later, codes - later).mT
            d_arguments_CJX = self.d_arguments_CJX[kind].narrow(1, later, codes - later)
            d_codes_CRX = torch.baddbmm(d_codes_CRX, gram_CRJ, d_arguments_CJX)
        if self.keep_CJ1 is not None:
            d_codes_CRX = d_codes_CRX * self.keep_CJ1[:, first, None]
        other = self.call.other(kind)
        start = first if other is not None and self.call.sees_own(other) else later
        if other is not None and start < codes:
            d_code_CRJ = self.d_code_CJJ[other].narrow(2, first, rank).narrow(1, start, codes - start).mT
            down_CJX = self.down_CJY[other].narrow(1, start, codes - start)
            d_codes_CRX = torch.baddbmm(d_codes_CRX, d_code_CRJ, down_CJX)
        d_argument_CRX = gelu_backward(d_codes_CRX, self.arguments[kind][layer])
        if kind == "channel" and self.call.frozen.a != 1:
            d_argument_CRX *= self.call.frozen.a
        self.own_d_arguments[kind][layer].copy_(d_argument_CRX)
        if other is not None:
            d_code_SJ = d_argument_CRX.flatten(0, 1) @ self.up_JY[other].T
            seen_CRJ = self.seen_CJJ[kind].narrow(1, first, rank)
            torch.mul(
                d_code_SJ.view(self.size, rank, codes),
                seen_CRJ,
                out=self.d_code_CJJ[kind].narrow(1, first, rank),
            )
        return d_argument_CRX

    def gradients(self, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
        """Of one kind's `Mixers`, but for the part of W_down that meets x."""
        down_QJY, d_arguments_CJX = self.down_QJY[kind], self.d_arguments_CJX[kind]
        d_gram_CJJ = torch.bmm(d_arguments_CJX, self.dropped_CJX[kind].mT)
        d_gram_QJJ = over(d_gram_CJJ, len(down_QJY)) * self.call.earlier_JJ
        d_down_QJY, other = torch.zeros_like(down_QJY), self.call.other(kind)
        if other is not None:
            d_down_QJY = over(torch.bmm(self.d_code_CJJ[kind], self.codes_CJX[other]), len(down_QJY))
        return d_down_QJY, self._d_up(kind), d_gram_QJJ

    def _d_up(self, kind: Kind) -> Tensor:
        """Through the pooled tokens, and through what the other kind's mixers make of the codes: (J, Y)."""
        other = self.call.other(kind)
        if other is None:
            return self.d_up_JY[kind]
        code_CJJ = torch.bmm(self.down_CJY[other], self.codes_CJX[kind].mT).mul_(self.seen_CJJ[other])
        d_arguments_SY = self.d_arguments_CJX[other].flatten(0, 1)
        return self.d_up_JY[kind].addmm_(code_CJJ.flatten(0, 1).T, d_arguments_SY)

    def _seen(self, kind: Kind, layer: int) -> tuple[Kind | None, int]:
        """The other kind, and how many of its codes are finished when this layer's mixer runs."""
        return self.call.other(kind), (layer + self.call.sees_own(kind)) * self.call.rank

    def _seen_codes(self, kind: Kind) -> Tensor:
        """What mixers (rows) see of the other kind's codes (columns), as drop-path leaves it: (C, J, J)."""
        earlier = self.call.earlier_JJ[None]
        if self.keep_CJ1 is not None:
            earlier = earlier * self.keep_CJ1.mT
        seen = earlier + self.call.same_JJ if self.call.sees_own(kind) else earlier
        return seen.expand(self.size, -1, -1)

    def _codes(self, kind: Kind, arguments: Tensor) -> Tensor:
        codes = F.gelu(arguments)
        # a token mixer's a stands in its ups
        return codes.mul_(self.call.frozen.a) if kind == "channel" and self.call.frozen.a != 1 else codes

    def _drop(self, codes_CJX: Tensor) -> Tensor:
        return codes_CJX if self.keep_CJ1 is None else codes_CJX * self.keep_CJ1

    def _by_layer(self, tensor_CJX: Tensor) -> Sequence[Tensor]:
        """A view (C, R, X) a layer."""
        by_layer: Tensor = tensor_CJX.unflatten(1, (self.call.layers, -1))
        return by_layer.unbind(1)


def gelu_backward(d_out: Tensor, argument: Tensor) -> Tensor:
    """Gradient of the exact GELU."""
    result: Tensor = torch.ops.aten.gelu_backward(d_out, argument)
    return result


def over(of_each_C: Tensor, num_matrices: int) -> Tensor:
    """A gradient of each sample, summed where all samples share one matrix: (Q, ..)."""
    return of_each_C.sum(0, keepdim=True) if num_matrices == 1 else of_each_C

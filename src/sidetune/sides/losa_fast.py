"""LoSA without ever building y: outputs and gradients of `sidetune.sides.losa`, in thin products.

    y_l = y_0 + H_l U_l + V_l G_l

H (N, J) holds the channel codes a*GELU(.) of all finished channel mixers, U (J, D) their stacked Wc_up;
G (J, D) the token codes GELU(.), V (N, J) their stacked a*Wt_up; J = l*R. With x_l = b_l + y_0 a layer
needs only

    X Wc_down  =  x_l Wc_down + H (U Wc_down) + V (G Wc_down)
    Wt_down X  =  Wt_down x_l + (Wt_down V) G + (Wt_down H) U

so the large operand of every product is a stored tap, and pool(y_L) is thin too: nothing of size (B, N, D)
is written but a chunk's x_l, in cache. For backward the arguments of the GELUs are kept, R(N+D) numbers a
layer and sample; all else is computed again. The gradients are these lines differentiated by hand.

The two lines are one: a mixer contracts an axis Y of x and keeps the other, X. A channel mixer contracts D
and keeps N; a token mixer contracts N and keeps D. Codes stand as (C, J, X) and ups as (J, Y), which makes
every product a GEMM without a copy. C is a chunk of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sidetune.features import Features
from sidetune.sides.base import every, frozen_taps, pool_weights
from sidetune.sides.chunks import over_chunks

if TYPE_CHECKING:
    from sidetune.sides.losa import Losa

Kind = Literal["channel", "token"]


class Mixers(NamedTuple):
    """The matrices of all mixers of one kind, or their gradients. Q = 1, or B where tokens are masked.

    Args:
        down_LMQRY: what contracts Y; a token mixer's has zeros at masked tokens.
        up_MJY: what writes Y, of all layers stacked; a token mixer's with the scale a.
        gram_MQJJ: the first times the second: what a mixer makes of its own kind's ups.
    """

    down_LMQRY: Tensor
    up_MJY: Tensor
    gram_MQJJ: Tensor


@dataclass(frozen=True)
class Frozen:
    """What a call reads and does not train.

    Args:
        taps: b_1 .. b_L (B, N, D), each with its scale, in any floating type.
        first: y_0 with its scale; None where it is zero.
        pool_QPN: weights of pooling over tokens, Q = 1 or B.
        keep_LMB: what drop-path multiplies a layer's output by; None without.
        kinds: the mixers of a layer in running order.
        sees: whether the second mixer of a layer sees the first's output.
        a: scale of the channel codes.
    """

    taps: Sequence[tuple[Tensor, float]]
    first: tuple[Tensor, float] | None
    pool_QPN: Tensor
    keep_LMB: Tensor | None
    kinds: tuple[Kind, ...]
    sees: bool
    a: float


def pooled_losa(side: Losa, features: Features, keeps: Sequence[Tensor | None]) -> Tensor:
    """What `Side.forward` returns.

    Args:
        side: its matrices and switches.
        features: of its spec.
        keeps: what drop-path multiplies each layer's output by, (M, B); None without.
    """
    first = {"b_L": side.blocks[-1].name, "z_0": "embedding", "zero": None}[side.first_state]
    kinds: tuple[Kind, ...] = ("channel", "token") if side.token else ("channel",)
    frozen = Frozen(
        taps=frozen_taps(side, features, [tap.name for tap in side.blocks]),
        first=None if first is None else frozen_taps(side, features, [first])[0],
        pool_QPN=pool_weights(side.spec.last, side.pool, features.mask, like=side.tap_scale),
        keep_LMB=torch.stack([keep for keep in keeps if keep is not None]) if keeps[0] is not None else None,
        kinds=kinds[::-1] if side.order == "token->channel" else kinds,
        sees=side.order != "parallel",
        a=side.a,
    )
    with torch.autocast(side.tap_scale.device.type, enabled=False):
        mixers = {"channel": _channel_mixers(side)}
        if side.token:
            mixers["token"] = _token_mixers(side, features.mask)
        matrices = [matrix for kind in frozen.kinds for matrix in mixers[kind]]
        pooled_MBPD: Tensor = FactoredLosa.apply(frozen, *matrices)
    return pooled_MBPD if side.pool == "tokens" else pooled_MBPD.flatten(2)


def _channel_mixers(side: Losa) -> Mixers:
    down_LMRD = torch.stack(every(side.channel, "down_MDR")).mT.contiguous()
    return _mixers(down_LMRD[:, :, None], torch.cat(every(side.channel, "up_MRD"), 1))


def _token_mixers(side: Losa, mask_BN: Tensor | None) -> Mixers:
    down_LM1RN = torch.stack(every(side.token, "down_MRN"))[:, :, None]
    up_MJN = torch.cat(every(side.token, "up_MNR"), 2).mT.contiguous() * side.a
    return _mixers(down_LM1RN if mask_BN is None else down_LM1RN * mask_BN[:, None].to(up_MJN), up_MJN)


def _mixers(down_LMQRY: Tensor, up_MJY: Tensor) -> Mixers:
    down_MQJY = down_LMQRY.permute(1, 2, 0, 3, 4).flatten(2, 3)
    return Mixers(down_LMQRY, up_MJY, down_MQJY @ up_MJY.mT[:, None])


class FactoredLosa(torch.autograd.Function):
    """pool(y_L), (M, B, P, D), from frozen taps and the stacked matrices of each kind of mixer."""

    @staticmethod
    def forward(ctx: Any, frozen: Frozen, *matrices: Tensor) -> Tensor:  # noqa: ANN401 - PyTorch's own
        """`matrices` are the three of `Mixers` for each kind, in the order of `frozen.kinds`."""
        mixers = _by_kind(frozen, matrices)
        batch, num_tokens, width = frozen.taps[0][0].shape
        members, codes, _ = mixers["channel"].up_MJY.shape
        kept = {
            kind: matrices[0].new_empty(members, batch, codes, num_tokens if kind == "channel" else width)
            for kind in frozen.kinds
        }
        out_MBPD = matrices[0].new_empty(members, batch, frozen.pool_QPN.shape[1], width)

        def work(rows: slice) -> None:
            chunk = _Chunk(frozen, mixers, {kind: kept[kind][:, rows] for kind in kept}, rows)
            out_MBPD[:, rows] = chunk.forward()

        over_chunks(work, batch, _scratch(frozen, kept), out_MBPD.device)
        ctx.frozen = frozen
        ctx.save_for_backward(*matrices, *kept.values())
        return out_MBPD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_MBPD: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - PyTorch's own
        """Gradients of the matrices."""
        frozen, count = ctx.frozen, 3 * len(ctx.frozen.kinds)
        matrices = ctx.saved_tensors[:count]
        mixers = _by_kind(frozen, matrices)
        kept = dict(zip(frozen.kinds, ctx.saved_tensors[count:], strict=True))

        def work(rows: slice) -> list[Tensor]:
            chunk = _Chunk(frozen, mixers, {kind: kept[kind][:, rows] for kind in kept}, rows)
            return chunk.backward(d_out_MBPD[:, rows])

        scratch = _scratch(frozen, kept, backward=True)
        parts = over_chunks(work, d_out_MBPD.shape[1], scratch, d_out_MBPD.device)
        return (
            None,
            *(_joined(same, like) for same, like in zip(zip(*parts, strict=True), matrices, strict=True)),
        )


def _by_kind(frozen: Frozen, matrices: Sequence[Tensor]) -> dict[Kind, Mixers]:
    return {kind: Mixers(*matrices[3 * i : 3 * i + 3]) for i, kind in enumerate(frozen.kinds)}


def _scratch(frozen: Frozen, kept: dict[Kind, Tensor], *, backward: bool = False) -> int:
    """Bytes that a sample of a chunk takes: x_l, y_0, and the codes with their gradients."""
    codes = sum(arguments[:, 0].numel() for arguments in kept.values())
    numbers = 2 * frozen.taps[0][0][0].numel() + (2 if backward else 1) * codes
    return numbers * kept["channel"].element_size()


def _joined(parts: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """A gradient from those of all chunks: their sum, or one beside the other where Q = B."""
    if parts[0].shape == like.shape:
        return torch.stack(parts).sum(0)
    return torch.cat(parts, 2 if like.ndim == 5 else 1)


class _Chunk:
    """C samples of a batch on their way through all layers and back."""

    def __init__(
        self, frozen: Frozen, mixers: dict[Kind, Mixers], arguments: dict[Kind, Tensor], rows: slice
    ) -> None:
        self.frozen, self.rows, self.arguments_MCJX = frozen, rows, arguments
        self.mixers = {kind: _of_rows(one, rows) for kind, one in mixers.items()}
        self.layers, self.members, _, self.rank, _ = mixers["channel"].down_LMQRY.shape
        self.size, (_, num_tokens, width) = rows.stop - rows.start, frozen.taps[0][0].shape
        self.x_CND = mixers["channel"].up_MJY.new_empty(self.size, num_tokens, width)
        self.first_CND: Tensor | None = None
        if frozen.first is not None:
            tap, scale = frozen.first
            self.first_CND = torch.empty_like(self.x_CND).copy_(tap[rows]).mul_(scale)
        pool = frozen.pool_QPN
        self.pool_CPN = (pool if len(pool) == 1 else pool[rows]).expand(self.size, -1, -1)
        self.codes_MCJX = {kind: torch.empty_like(one) for kind, one in arguments.items()}

    def forward(self) -> Tensor:
        """pool(y_L): (M, C, P, D). Writes the arguments of the GELUs."""
        for layer in range(self.layers):
            x_CND = self._x(layer)
            for kind in self.frozen.kinds:
                down_CSY = self._of_all_members(kind, layer)
                products = self._of_each_member(torch.bmm(down_CSY, _contracted(x_CND, kind)))
                for m, argument_CRX in enumerate(products):
                    self._add_known(kind, layer, m, argument_CRX)
                    self.arguments_MCJX[kind][m][:, self._own(layer)] = argument_CRX
                self._activate(kind, self._own(layer))
            self._drop(self._own(layer), layer)
        return torch.stack([self._pooled(m) for m in range(self.members)])

    def backward(self, d_out_MCPD: Tensor) -> list[Tensor]:
        """Gradients of the matrices from these samples, in the order that `FactoredLosa` takes them."""
        for kind in self.frozen.kinds:
            self._activate(kind, slice(None))
        for layer in range(self.layers):
            self._drop(self._own(layer), layer)
        self.d_codes_MCJX = {kind: torch.empty_like(codes) for kind, codes in self.codes_MCJX.items()}
        self.d_mixers = {kind: Mixers(*map(torch.zeros_like, one)) for kind, one in self.mixers.items()}
        for m in range(self.members):
            self._pooled_backward(m, d_out_MCPD[m])
        for layer in reversed(range(self.layers)):
            x_CND = self._x(layer)
            self._undrop(layer)
            for kind in reversed(self.frozen.kinds):
                d_arguments = [self._mixer_backward(kind, layer, m) for m in range(self.members)]
                d_down_CSY = torch.bmm(torch.cat(d_arguments, 1), _contracted(x_CND, kind).mT)
                for m, d_down_CRY in enumerate(self._of_each_member(d_down_CSY)):
                    self._add(self.d_mixers[kind].down_LMQRY[layer, m], d_down_CRY)
        return [matrix for kind in self.frozen.kinds for matrix in self.d_mixers[kind]]

    def _add_known(self, kind: Kind, layer: int, m: int, argument_CRX: Tensor) -> None:
        """Add to W x what W makes of the finished codes: (W same_up^T) same + (W other^T) other_up."""
        before, own = slice(0, layer * self.rank), self._own(layer)
        if layer:
            gram_CRJ = self.mixers[kind].gram_MQJJ[m][:, own, before].expand(self.size, -1, -1)
            argument_CRX.baddbmm_(gram_CRJ, self.codes_MCJX[kind][m][:, before])
        other, seen = self._seen(kind, layer)
        if seen.stop:
            code_CRJ = torch.bmm(self._down(kind, layer, m), self.codes_MCJX[other][m][:, seen].mT)
            up_JX = self.mixers[other].up_MJY[m][seen]
            argument_CRX.flatten(0, 1).addmm_(code_CRJ.flatten(0, 1), up_JX)

    def _mixer_backward(self, kind: Kind, layer: int, m: int) -> Tensor:
        """The gradient of a mixer's argument, (C, R, X); adds those of all that it sees but x."""
        before, own = slice(0, layer * self.rank), self._own(layer)
        d_codes_CRX = self.d_codes_MCJX[kind][m][:, own]
        d_argument_CRX = gelu_backward(d_codes_CRX, self.arguments_MCJX[kind][m][:, own])
        if kind == "channel" and self.frozen.a != 1:
            d_argument_CRX *= self.frozen.a
        if layer:
            d_gram_CRJ = torch.bmm(d_argument_CRX, self.codes_MCJX[kind][m][:, before].mT)
            self._add(self.d_mixers[kind].gram_MQJJ[m][:, own, before], d_gram_CRJ)
            gram_CJR = self.mixers[kind].gram_MQJJ[m][:, own, before].mT.expand(self.size, -1, -1)
            self.d_codes_MCJX[kind][m][:, before] += torch.bmm(gram_CJR, d_argument_CRX)
        other, seen = self._seen(kind, layer)
        if seen.stop:
            down_CRY, other_CJY = self._down(kind, layer, m), self.codes_MCJX[other][m][:, seen]
            d_argument_SX, up_JX = d_argument_CRX.flatten(0, 1), self.mixers[other].up_MJY[m][seen]
            code_SJ = torch.bmm(down_CRY, other_CJY.mT).flatten(0, 1)
            self.d_mixers[other].up_MJY[m][seen].addmm_(code_SJ.T, d_argument_SX)
            d_code_CRJ = (d_argument_SX @ up_JX.T).unflatten(0, (self.size, self.rank))
            self._add(self.d_mixers[kind].down_LMQRY[layer, m], torch.bmm(d_code_CRJ, other_CJY))
            self.d_codes_MCJX[other][m][:, seen] += torch.bmm(d_code_CRJ.mT, down_CRY)
        return d_argument_CRX

    def _add(self, into_Q: Tensor, of_each_C: Tensor) -> None:
        """Add a gradient of each sample: summed where all samples share a matrix."""
        into_Q += of_each_C if len(into_Q) == len(of_each_C) else of_each_C.sum(0)

    def _x(self, layer: int) -> Tensor:
        """x_l = b_l + y_0: (C, N, D), in one piece of scratch."""
        tap, scale = self.frozen.taps[layer]
        self.x_CND.copy_(tap[self.rows])
        if self.first_CND is None:
            return self.x_CND.mul_(scale)
        return torch.add(self.first_CND, self.x_CND, alpha=scale, out=self.x_CND)

    def _down(self, kind: Kind, layer: int, m: int) -> Tensor:
        """W_down for each sample: (C, R, Y)."""
        return self.mixers[kind].down_LMQRY[layer, m].expand(self.size, -1, -1)

    def _of_all_members(self, kind: Kind, layer: int) -> Tensor:
        """Every member's W_down in one matrix, for each sample: (C, M*R, Y)."""
        down_MQRY = self.mixers[kind].down_LMQRY[layer]
        return down_MQRY.transpose(0, 1).flatten(1, 2).expand(self.size, -1, -1)

    def _of_each_member(self, product_CSX: Tensor) -> Sequence[Tensor]:
        """The parts (C, R, X) of a product with that matrix."""
        if self.members == 1:
            return [product_CSX]
        return [part.contiguous() for part in product_CSX.split(self.rank, 1)]

    def _own(self, layer: int) -> slice:
        """Where a layer's codes stand."""
        return slice(layer * self.rank, (layer + 1) * self.rank)

    def _seen(self, kind: Kind, layer: int) -> tuple[Kind, slice]:
        """The other kind, and the codes of it that are finished when this layer's mixer runs."""
        kinds = self.frozen.kinds
        if len(kinds) == 1:
            return kind, slice(0, 0)
        second = kind == kinds[1] and self.frozen.sees
        return kinds[1 - kinds.index(kind)], slice(0, (layer + second) * self.rank)

    def _activate(self, kind: Kind, codes: slice) -> None:
        """Codes from the arguments of their GELUs."""
        activated = F.gelu(self.arguments_MCJX[kind][:, :, codes])
        if kind == "channel" and self.frozen.a != 1:  # a token mixer's a stands in its ups
            activated *= self.frozen.a
        self.codes_MCJX[kind][:, :, codes] = activated

    def _drop(self, own: slice, layer: int) -> None:
        """What later layers see of a layer that drop-path skips."""
        if self.frozen.keep_LMB is not None:
            for codes_MCJX in self.codes_MCJX.values():
                codes_MCJX[:, :, own] *= self.frozen.keep_LMB[layer][:, self.rows, None, None]

    def _undrop(self, layer: int) -> None:
        """The codes as the layer itself saw them; their gradients so far come from later layers."""
        if self.frozen.keep_LMB is not None:
            own = self._own(layer)
            for kind in self.frozen.kinds:
                self._activate(kind, own)
                self.d_codes_MCJX[kind][:, :, own] *= self.frozen.keep_LMB[layer][:, self.rows, None, None]

    def _pooled(self, m: int) -> Tensor:
        """pool(y_0) + pool(H) U + pool(V) G: (C, P, D)."""
        H_CJN, U_JD = self.codes_MCJX["channel"][m], self.mixers["channel"].up_MJY[m]
        out_CPD = torch.bmm(self.pool_CPN, H_CJN.mT) @ U_JD
        if "token" in self.mixers:
            pooled_CPJ = self.pool_CPN @ self.mixers["token"].up_MJY[m].T
            out_CPD += torch.bmm(pooled_CPJ, self.codes_MCJX["token"][m])
        if self.first_CND is not None:
            out_CPD += torch.bmm(self.pool_CPN, self.first_CND)
        return out_CPD

    def _pooled_backward(self, m: int, d_out_CPD: Tensor) -> None:
        """The same, differentiated: begins the gradients of the codes."""
        H_CJN, U_JD = self.codes_MCJX["channel"][m], self.mixers["channel"].up_MJY[m]
        pooled_CPJ = torch.bmm(self.pool_CPN, H_CJN.mT)
        self.d_mixers["channel"].up_MJY[m].addmm_(pooled_CPJ.flatten(0, 1).T, d_out_CPD.flatten(0, 1))
        self.d_codes_MCJX["channel"][m] = torch.bmm((d_out_CPD @ U_JD.T).mT, self.pool_CPN)
        if "token" in self.mixers:
            G_CJD, V_JN = self.codes_MCJX["token"][m], self.mixers["token"].up_MJY[m]
            d_pooled_CPJ = torch.bmm(d_out_CPD, G_CJD.mT)
            self.d_mixers["token"].up_MJY[m] += torch.bmm(d_pooled_CPJ.mT, self.pool_CPN).sum(0)
            self.d_codes_MCJX["token"][m] = torch.bmm((self.pool_CPN @ V_JN.T).mT, d_out_CPD)


def _of_rows(mixers: Mixers, rows: slice) -> Mixers:
    """What meets these samples: the whole, unless tokens are masked."""
    if mixers.down_LMQRY.shape[2] == 1:
        return mixers
    return Mixers(mixers.down_LMQRY[:, :, rows], mixers.up_MJY, mixers.gram_MQJJ[:, rows])


def gelu_backward(d_out: Tensor, argument: Tensor) -> Tensor:
    """Gradient of the exact GELU."""
    result: Tensor = torch.ops.aten.gelu_backward(d_out, argument)
    return result


def _contracted(x_CND: Tensor, kind: Kind) -> Tensor:
    """A chunk with the axis that a mixer contracts in front: (C, Y, X)."""
    return x_CND.mT if kind == "channel" else x_CND

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
from torch import Tensor
from torch.autograd.function import once_differentiable

from sidetune.features import Features
from sidetune.sides.base import every, frozen_taps, pool_weights
from sidetune.sides.chunks import of_rows, over_chunks
from sidetune.sides.losa_codes import MemberCodes, over
from sidetune.sides.products import times_transposed

if TYPE_CHECKING:
    from sidetune.sides.losa import Losa

Kind = Literal["channel", "token"]


class Mixers(NamedTuple):
    """The matrices of all mixers of one kind, or their gradients. Q = 1, or B where tokens are masked.

    Args:
        down_MQJY: what contracts Y, of all layers stacked; a token mixer's has zeros at masked tokens.
        up_MJY: what writes Y, likewise; a token mixer's with the scale a.
        gram_MQJJ: the first times the second: what a mixer makes of its own kind's ups.
    """

    down_MQJY: Tensor
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


def pooled_losa(side: Losa, features: Features, keep_LMB: Tensor | None) -> Tensor:
    """What `Side.forward` returns.

    Args:
        side: its matrices and switches.
        features: of its spec.
        keep_LMB: what drop-path multiplies a layer's output by; None without.
    """
    first = {"b_L": side.blocks[-1].name, "z_0": "embedding", "zero": None}[side.first_state]
    kinds: tuple[Kind, ...] = ("channel", "token") if side.token else ("channel",)
    frozen = Frozen(
        taps=frozen_taps(side, features, [tap.name for tap in side.blocks]),
        first=None if first is None else frozen_taps(side, features, [first])[0],
        pool_QPN=pool_weights(side.spec.last, side.pool, features.mask, like=side.tap_scale),
        keep_LMB=keep_LMB,
        kinds=kinds[::-1] if side.order == "token->channel" else kinds,
        sees=side.order != "parallel",
        a=side.a,
    )
    with torch.autocast(side.tap_scale.device.type, enabled=False):
        mixers = {"channel": _channel_mixers(side)}
        if side.token:
            mixers["token"] = _token_mixers(side, features.mask)
        matrices = [matrix for kind in frozen.kinds for matrix in mixers[kind]]
        pooled_MBPD: Tensor = FactoredLosa.apply(frozen, len(side.blocks), *matrices)
    return pooled_MBPD if side.pool == "tokens" else pooled_MBPD.flatten(2)


def _channel_mixers(side: Losa) -> Mixers:
    down_MJD = torch.cat(every(side.channel, "down_MDR"), 2).mT.contiguous()
    return _mixers(down_MJD[:, None], torch.cat(every(side.channel, "up_MRD"), 1))


def _token_mixers(side: Losa, mask_BN: Tensor | None) -> Mixers:
    down_M1JN = torch.cat(every(side.token, "down_MRN"), 1)[:, None]
    up_MJN = torch.cat(every(side.token, "up_MNR"), 2).mT.contiguous() * side.a
    return _mixers(down_M1JN if mask_BN is None else down_M1JN * mask_BN[:, None].to(up_MJN), up_MJN)


def _mixers(down_MQJY: Tensor, up_MJY: Tensor) -> Mixers:
    return Mixers(down_MQJY, up_MJY, down_MQJY @ up_MJY.mT[:, None])


class FactoredLosa(torch.autograd.Function):
    """pool(y_L), (M, B, P, D), from frozen taps and the stacked matrices of each kind of mixer."""

    @staticmethod
    def forward(ctx: Any, frozen: Frozen, layers: int, *matrices: Tensor) -> Tensor:  # noqa: ANN401 - PyTorch's own
        """`matrices` are the three of `Mixers` for each kind, in the order of `frozen.kinds`."""
        call = Call(frozen, layers, _by_kind(frozen, matrices))
        kept = {kind: call.new_arguments(kind) for kind in frozen.kinds}
        out_MBPD = matrices[0].new_empty(call.members, call.batch, frozen.pool_QPN.shape[1], call.width)

        def work(rows: slice) -> None:
            out_MBPD[:, rows] = _Chunk(call, kept, rows).forward()

        over_chunks(work, call.batch, call.scratch, out_MBPD.device)
        ctx.frozen, ctx.layers = frozen, layers
        ctx.save_for_backward(*matrices, *kept.values())
        return out_MBPD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_MBPD: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - PyTorch's own
        """Gradients of the matrices."""
        frozen, count = ctx.frozen, 3 * len(ctx.frozen.kinds)
        matrices = ctx.saved_tensors[:count]
        call = Call(frozen, ctx.layers, _by_kind(frozen, matrices))
        kept = dict(zip(frozen.kinds, ctx.saved_tensors[count:], strict=True))

        def work(rows: slice) -> list[Tensor]:
            return _Chunk(call, kept, rows).backward(d_out_MBPD[:, rows])

        parts = over_chunks(work, call.batch, 2 * call.scratch, d_out_MBPD.device)
        return (None, None, *(_whole(same, like) for *same, like in zip(*parts, matrices, strict=True)))


def _by_kind(frozen: Frozen, matrices: Sequence[Tensor]) -> dict[Kind, Mixers]:
    return {kind: Mixers(*matrices[3 * i : 3 * i + 3]) for i, kind in enumerate(frozen.kinds)}


def _whole(parts: list[Tensor], like: Tensor) -> Tensor:
    """A gradient from those of all chunks: their sum, or one beside the other where Q = B."""
    return torch.stack(parts).sum(0) if parts[0].shape == like.shape else torch.cat(parts, 1)


class Call:
    """What all chunks of a call share."""

    def __init__(self, frozen: Frozen, layers: int, mixers: dict[Kind, Mixers]) -> None:
        self.frozen, self.layers, self.mixers = frozen, layers, mixers
        self.batch, self.num_tokens, self.width = frozen.taps[0][0].shape
        self.members, self.codes, _ = mixers["channel"].up_MJY.shape
        self.rank = self.codes // layers
        # every member's W_down of a layer in one matrix: their products with a tap are one
        self.joint_LQSY = {
            kind: one.down_MQJY.unflatten(2, (layers, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)
            for kind, one in mixers.items()
        }
        layer_J = torch.arange(self.codes, device=frozen.pool_QPN.device) // self.rank
        self.earlier_JJ = (layer_J[None] < layer_J[:, None]).to(frozen.pool_QPN)
        self.same_JJ = (layer_J[None] == layer_J[:, None]).to(frozen.pool_QPN)

    def new_arguments(self, kind: Kind) -> Tensor:
        """Room for the arguments of the GELUs: (L, M, B, R, X)."""
        kept_axis = self.num_tokens if kind == "channel" else self.width
        up_MJY = self.mixers[kind].up_MJY
        return up_MJY.new_empty(self.layers, self.members, self.batch, self.rank, kept_axis)

    @property
    def scratch(self) -> int:
        """Bytes that a sample of a chunk takes: x_l, y_0, and the codes."""
        codes = self.members * self.codes * (self.num_tokens + self.width)
        return (2 * self.num_tokens * self.width + codes) * self.frozen.pool_QPN.element_size()

    def other(self, kind: Kind) -> Kind | None:
        """The other kind of mixer, if there is one."""
        return next((one for one in self.frozen.kinds if one != kind), None)

    def sees_own(self, kind: Kind) -> bool:
        """Whether a mixer sees what the other of its own layer puts out."""
        return self.frozen.sees and kind == self.frozen.kinds[-1] != self.frozen.kinds[0]


class _Chunk:
    """C samples of a batch on their way through all layers and back: the products with the taps."""

    def __init__(self, call: Call, kept: dict[Kind, Tensor], rows: slice) -> None:
        self.call, frozen, self.size = call, call.frozen, rows.stop - rows.start
        self.taps = [(tap[rows], scale) for tap, scale in frozen.taps]
        self.x_CND = frozen.pool_QPN.new_empty(self.size, call.num_tokens, call.width)
        self.first_CND: Tensor | None = None
        if frozen.first is not None:
            tap, scale = frozen.first
            self.first_CND = torch.empty_like(self.x_CND).copy_(tap[rows]).mul_(scale)
        self.joint_LCSY = {
            kind: of_rows(joint_LQSY, 1, rows).expand(-1, self.size, -1, -1).unbind()
            for kind, joint_LQSY in call.joint_LQSY.items()
        }
        self.members = [MemberCodes(call, m, kept, rows) for m in range(call.members)]

    def forward(self) -> Tensor:
        """pool(y_L): (M, C, P, D). Writes the arguments of the GELUs."""
        for layer in range(self.call.layers):
            x_CND = self._x(layer)
            for kind in self.call.frozen.kinds:
                product_CSX = self._product(kind, layer, x_CND)
                for member, part_CRX in zip(self.members, product_CSX.split(self.call.rank, 1), strict=True):
                    member.mix(kind, layer, part_CRX)
            for member in self.members:
                member.drop(layer)
        return torch.stack([member.pooled(self.first_CND) for member in self.members])

    def backward(self, d_out_MCPD: Tensor) -> list[Tensor]:
        """Gradients of the matrices from these samples, in the order that `FactoredLosa` takes them."""
        kinds = self.call.frozen.kinds
        for member, d_out_CPD in zip(self.members, d_out_MCPD, strict=True):
            member.begin_backward(d_out_CPD)
        d_joint: dict[Kind, list[Tensor]] = {kind: [] for kind in kinds}
        for layer in reversed(range(self.call.layers)):
            x_CND = self._x(layer)
            for kind in reversed(kinds):
                d_arguments = [member.mix_backward(kind, layer) for member in self.members]
                d_argument_CSX = d_arguments[0] if len(d_arguments) == 1 else torch.cat(d_arguments, 1)
                d_joint[kind].append(self._product_backward(kind, d_argument_CSX, x_CND))
        gradients = []
        for kind in kinds:
            d_joint_LQMRY = torch.stack(d_joint[kind][::-1]).unflatten(2, (self.call.members, -1))
            by_x_MQJY = d_joint_LQMRY.permute(2, 1, 0, 3, 4).flatten(2, 3)
            d_down, d_up, d_gram = zip(*(member.gradients(kind) for member in self.members), strict=True)
            gradients += [torch.stack(d_down).add_(by_x_MQJY), torch.stack(d_up), torch.stack(d_gram)]
        return gradients

    def _product(self, kind: Kind, layer: int, x_CND: Tensor) -> Tensor:
        """W x of all members: (C, S, X), S = M*R."""
        if kind == "token":
            return torch.bmm(self.joint_LCSY[kind][layer], x_CND)
        product_SX = times_transposed(self.call.joint_LQSY[kind][layer, 0], x_CND.flatten(0, 1))
        product_SCX: Tensor = product_SX.unflatten(1, (self.size, -1))
        return product_SCX.transpose(0, 1)

    def _product_backward(self, kind: Kind, d_argument_CSX: Tensor, x_CND: Tensor) -> Tensor:
        """The gradient of W: (Q, S, Y)."""
        if kind == "token":
            d_down_CSN = torch.bmm(d_argument_CSX, x_CND.mT)
            return over(d_down_CSN, self.call.joint_LQSY[kind].shape[1])
        d_argument_SX = d_argument_CSX.transpose(0, 1).flatten(1)
        return times_transposed(d_argument_SX, x_CND.flatten(0, 1).T)[None]

    def _x(self, layer: int) -> Tensor:
        """x_l = b_l + y_0: (C, N, D), in one piece of scratch."""
        tap, scale = self.taps[layer]
        self.x_CND.copy_(tap)
        if self.first_CND is None:
            return self.x_CND.mul_(scale)
        return torch.add(self.first_CND, self.x_CND, alpha=scale, out=self.x_CND)

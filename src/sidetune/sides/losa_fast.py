"""LoSA without ever building y: outputs and gradients of `sidetune.sides.losa`, in thin products.

    y_l = y_0 + H_l U_l + V_l G_l

H (N, J) holds the channel codes a*GELU(.) of all finished channel mixers, U (J, D) their stacked Wc_up;
G (J, D) the token codes GELU(.), V (N, J) their stacked a*Wt_up; J = l*R. With x_l = b_l + y_0 a layer
needs only

    X Wc_down  =  x_l Wc_down + H (U Wc_down) + V (G Wc_down)
    Wt_down X  =  Wt_down x_l + (Wt_down V) G + (Wt_down H) U

so the large operand of a product is a stored tap, and pool(y_L) is thin too: nothing of size (B, N, D)
is written but a chunk's x_l, in cache. For backward the arguments of the GELUs are kept, R(N+D) numbers a
layer and sample, R(2N+D) a frame; all else is computed again. The gradients are these lines differentiated
by hand.

The two lines are one: a mixer contracts an axis Y of x and keeps the other, X. A channel mixer contracts D
and keeps N; a token mixer contracts N and keeps D (`sidetune.sides.losa_codes`). C is a chunk of the batch. A
tap is read once for all members of a piece, by one product with the W_down of them all.

A clip is T samples here, its frames, whose tokens space mixers mix. A time mixer's Wd_up stands beside the
channel mixers' Wc_up, and its codes a*Wt_up GELU(Wt_down .) beside theirs: it contracts D, too, and between
its two matrices mixes the frames of a clip. Pooled frames are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sidetune.features import Features
from sidetune.sides.base import frozen_taps, pool_weights
from sidetune.sides.chunks import CACHE_BYTES, Scratches, on_threads, over_rows
from sidetune.sides.losa_codes import Block, Codes
from sidetune.sides.losa_gradients import CodeGradients
from sidetune.sides.losa_mixers import Kind, Mixers, Piece, mixers_of
from sidetune.sides.products import each_times_transposed, times_transposed, wide

if TYPE_CHECKING:
    from sidetune.sides.losa import Losa

BLOCK_ROWS = 32  # codes of the layers that are worked on together
MOST_MEMBERS = 16  # of a piece
LEAST_SAMPLES = 10  # likewise, even where they leave the cache: each product is a call from Python
CHUNK_SCALE = 4  # chunks are so many times larger than other sides', for the same reason


@dataclass(frozen=True)
class Frozen:
    """What a call reads and does not train.

    Args:
        taps: b_1 .. b_L (B, N, D), each with its scale, in any floating type.
        first: y_0 with its scale; None where it is zero.
        scratches: what chunks work in; the side's own, so that a graph does not keep it.
        pool_QPN: weights of pooling over tokens, Q = 1 or B.
        keep_LMB: what drop-path multiplies a layer's output by; None without.
        mask_BN: 1 where token mixers read a token, else 0; None: they read all.
        kinds: the mixers of a layer in running order.
        sees: whether a mixer of a layer sees the output of those before it.
        a: scale of the channel codes.
        frames: T, of a clip, which follow one another as samples; 1: the samples are images.
    """

    taps: Sequence[tuple[Tensor, float]]
    first: tuple[Tensor, float] | None
    scratches: ReferenceType[Scratches]
    pool_QPN: Tensor
    keep_LMB: Tensor | None
    mask_BN: Tensor | None
    kinds: tuple[Kind, ...]
    sees: bool
    a: float
    frames: int = 1


def pooled_losa(side: Losa, features: Features, keep_LMB: Tensor | None) -> Tensor:
    """What `Side.forward` returns.

    Args:
        side: its matrices and switches.
        features: of its spec.
        keep_LMB: what drop-path multiplies a layer's output by; None without.
    """
    first = {"b_L": side.blocks[-1].name, "z_0": "embedding", "zero": None}[side.first_state]
    frames, rows = side.frames or 1, partial(_of_frames, side.frames or 1)
    mask_BN = None if features.mask is None else rows(features.mask.to(side.tap_scale))
    names = [tap.name for tap in side.blocks] + ([] if first is None else [first])
    taps = [(rows(tap), scale) for tap, scale in frozen_taps(side, features, names)]
    frozen = Frozen(
        taps=taps[: len(side.blocks)],
        first=None if first is None else taps[-1],
        scratches=ref(side.scratches),
        pool_QPN=_pool(side, features),
        keep_LMB=None if keep_LMB is None else keep_LMB.repeat_interleave(frames, 2),
        mask_BN=mask_BN,
        kinds=_kinds(side),
        sees=side.order != "parallel",
        a=side.a,
        frames=frames,
    )
    with torch.autocast(side.tap_scale.device.type, enabled=False):
        matrices = mixers_of(side, frozen.kinds, mask_BN).tensors
        pooled_MBPD: Tensor = FactoredLosa.apply(frozen, len(side.blocks), *matrices)
    return pooled_MBPD if side.pool == "tokens" else pooled_MBPD.flatten(2)


def _kinds(side: Losa) -> tuple[Kind, ...]:
    mixing: tuple[Kind, ...] = ("token", "time") if side.frames else ("token",) if side.token else ()
    return (*mixing, "channel") if side.order == "token->channel" else ("channel", *mixing)


def _of_frames(frames: int, tensor: Tensor) -> Tensor:
    """(B, T*N, ..) as frames: (B*T, N, ..); of images the same."""
    if frames == 1:
        return tensor
    by_frame: Tensor = tensor.unflatten(1, (frames, -1)).flatten(0, 1)
    return by_frame


def _pool(side: Losa, features: Features) -> Tensor:
    """Weights of pooling, of clips by frame: (Q, P, N), Q = 1, or B * T with a mask."""
    pool_QPN = pool_weights(side.spec.last, side.pool, features.mask, like=side.tap_scale)
    if side.frames is None:
        return pool_QPN
    pool_QTPN: Tensor = pool_QPN.unflatten(2, (side.frames, -1)).transpose(1, 2)
    return pool_QTPN[:, 0] if features.mask is None else pool_QTPN.flatten(0, 1)


class FactoredLosa(torch.autograd.Function):
    """pool(y_L), (M, B, P, D), from frozen taps and the stacked matrices of all mixers."""

    @staticmethod
    def forward(ctx: Any, frozen: Frozen, layers: int, *matrices: Tensor) -> Tensor:  # noqa: ANN401 - PyTorch's own
        """`matrices` are the tensors of `Mixers`."""
        call = Call(frozen, layers, Mixers.build(frozen.kinds, matrices))
        trains = any(ctx.needs_input_grad)
        kept = {kind: call.new_arguments(kind) for kind in frozen.kinds} if trains else {}
        clips = call.clips(slice(0, call.batch)).stop
        out_MBPD = matrices[0].new_empty(call.members, clips, frozen.pool_QPN.shape[1], call.width)

        def work(piece: Piece) -> None:
            out_MBPD[piece[0], call.clips(piece[1])] = Chunk(call, kept, piece).forward()

        ctx.pieces = call.pieces()
        for _ in on_threads(work, ctx.pieces, out_MBPD.device):
            pass
        ctx.frozen, ctx.layers, ctx.count = frozen, layers, len(matrices)
        ctx.save_for_backward(*matrices, *kept.values())
        return out_MBPD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_MBPD: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - PyTorch's own
        """Gradients of the matrices."""
        frozen, saved = ctx.frozen, ctx.saved_tensors
        call = Call(frozen, ctx.layers, Mixers.build(frozen.kinds, saved[: ctx.count]))
        kept = dict(zip(frozen.kinds, saved[ctx.count :], strict=True))

        def work(piece: Piece) -> tuple[Piece, Mixers]:
            d_out_MCPD = d_out_MBPD[piece[0], call.clips(piece[1])]
            return piece, Chunk(call, kept, piece).backward(d_out_MCPD)

        total = call.mixers.zeros()
        for piece, part in on_threads(work, ctx.pieces, d_out_MBPD.device):
            total.part(piece).add(part)
        for (kind, source), gram_MQJJ in total.gram_MQJJ.items():
            gram_MQJJ.mul_(call.earlier_JJ + call.same_JJ * call.sees_own(kind, source))
        return (None, None, *total.tensors)


class Call:
    """What all chunks of a call share."""

    def __init__(self, frozen: Frozen, layers: int, mixers: Mixers) -> None:
        self.frozen, self.layers, self.mixers = frozen, layers, mixers
        self.batch, self.num_tokens, self.width = frozen.taps[0][0].shape
        self.members, self.codes, _ = mixers.up_MJY["channel"].shape
        self.rank = self.codes // layers
        # every member's W_down of a layer in one matrix: their products with a tap are one
        self.joint_LMRY = {
            kind: down_MJY.unflatten(1, (layers, -1)).transpose(0, 1).contiguous()
            for kind, down_MJY in mixers.down_MJY.items()
        }
        layer_J = torch.arange(self.codes, device=frozen.pool_QPN.device) // self.rank
        self.earlier_JJ = (layer_J[None] < layer_J[:, None]).to(frozen.pool_QPN)
        self.same_JJ = (layer_J[None] == layer_J[:, None]).to(frozen.pool_QPN)

    @property
    def blocks(self) -> list[Block]:
        """Layers that are worked on together."""
        size = max(1, BLOCK_ROWS // self.rank)
        count = -(-self.layers // size)
        bounds = [self.layers * i // count for i in range(count + 1)]
        return [Block(a, b, a * self.rank, b * self.rank) for a, b in pairwise(bounds)]

    def new_arguments(self, kind: Kind) -> Tensor:
        """Room for what codes are made of: (B, M, J*X). A chunk has what its rows take in one piece."""
        numel = self.codes * self.kept_axis(kind)
        return self.mixers.up_MJY[kind].new_empty(self.batch, self.members, numel)

    def kept_axis(self, kind: Kind) -> int:
        """X, the axis that a mixer does not contract."""
        return self.width if kind == "token" else self.num_tokens

    def clips(self, rows: slice) -> slice:
        """Which clips some rows are frames of; of images the same rows."""
        return slice(rows.start // self.frozen.frames, rows.stop // self.frozen.frames)

    def pieces(self) -> list[Piece]:
        """Some members on some samples each, so that what they work on stays near the cache."""
        size = self.frozen.pool_QPN.element_size()
        taps, frames = 3 * self.num_tokens * self.width, self.frozen.frames
        codes = self.codes * sum(self.kept_axis(kind) for kind in self.frozen.kinds)
        groups = -(-self.members // MOST_MEMBERS)
        bounds = [self.members * i // groups for i in range(groups + 1)]
        together = -(-self.members // groups)
        sample_bytes = size * (taps + 3 * codes * together)
        fitting = min(sample_bytes, CACHE_BYTES // LEAST_SAMPLES)
        whole = over_rows(self.batch // frames, frames * fitting, self.frozen.pool_QPN.device, CHUNK_SCALE)
        rows = [slice(frames * some.start, frames * some.stop) for some in whole]
        return [(slice(*group), some) for some in rows for group in pairwise(bounds)]

    def sees_own(self, kind: Kind, source: Kind) -> bool:
        """Whether a mixer sees what another one of its own layer puts out."""
        kinds = self.frozen.kinds
        return self.frozen.sees and kinds.index(source) < kinds.index(kind)


class Chunk:
    """Some members on C samples, on their way through all layers and back: the products with the taps."""

    def __init__(self, call: Call, kept: dict[Kind, Tensor], piece: Piece) -> None:
        self.call, frozen, (members, rows) = call, call.frozen, piece
        self.size, self.piece = rows.stop - rows.start, piece
        self.scratches = frozen.scratches() or Scratches()
        self.scratch = self.scratches.take()
        self.taps = [(tap[rows], scale) for tap, scale in frozen.taps]
        self.x_CND = self._room("x", self.size, call.num_tokens, call.width)
        self.first_CND: Tensor | None = None
        if frozen.first is not None:
            tap, scale = frozen.first
            self.first_CND = self._room("first", *self.x_CND.shape).copy_(tap[rows]).mul_(scale)
        self.joint_LSY = {kind: one[:, members].flatten(1, 2) for kind, one in call.joint_LMRY.items()}
        arguments = {kind: self._arguments(kind, kept) for kind in frozen.kinds}
        self.codes = Codes(call, arguments, piece, self.scratch)

    def forward(self) -> Tensor:
        """pool(y_L): (M, C, P, D). Writes the arguments of the GELUs."""
        kinds, codes = self.call.frozen.kinds, self.codes
        for block in self.call.blocks:
            for layer in range(block.first, block.end):
                x_CND = self._x(layer)
                for kind in kinds:
                    self._read(kind, layer, x_CND)
            for kind in kinds:
                codes.begin(kind, block)
            for layer in range(block.first, block.end):
                for kind in kinds:
                    codes.mix(kind, layer, block)
                codes.drop(layer)
        out_MCPD = codes.pooled(self.first_CND)
        self.scratches.give_back(self.scratch)
        frames = self.call.frozen.frames
        return out_MCPD if frames == 1 else out_MCPD.unflatten(1, (-1, frames)).sum(2)

    def backward(self, d_out_MCPD: Tensor) -> Mixers:
        """Gradients of the matrices of these members from these samples; d_out of images, or of clips."""
        kinds, frames = self.call.frozen.kinds, self.call.frozen.frames
        total = self.codes.mixers.zeros()
        by_row = d_out_MCPD if frames == 1 else d_out_MCPD.repeat_interleave(frames, 1)
        gradients = CodeGradients(self.codes, total, by_row)
        for block in reversed(self.call.blocks):
            layers = range(block.first, block.end)
            for kind in kinds:
                gradients.begin(kind, block)
            for layer in reversed(layers):
                for kind in reversed(kinds):
                    gradients.mix(kind, layer, block)
            for kind in kinds:
                gradients.end(kind, block)
            for layer in layers:
                x_CND = self._x(layer)
                for kind in kinds:
                    own = slice(layer * self.call.rank, (layer + 1) * self.call.rank)
                    d_argument_MRCX = gradients.d_arguments[kind][:, own]
                    total.down_MJY[kind][:, own] += self._read_backward(kind, d_argument_MRCX, x_CND)
        self.scratches.give_back(self.scratch)
        return total

    def _arguments(self, kind: Kind, kept: dict[Kind, Tensor]) -> Tensor:
        """Room for them: (M, J, C, X). Where nothing trains they are not kept."""
        members, rows = self.piece
        if kind in kept:
            return kept[kind][rows].view(self.call.members, self.call.codes, self.size, -1)[members]
        count, axis = members.stop - members.start, self.call.kept_axis(kind)
        return self._room(f"arguments/{kind}", count, self.call.codes, self.size, axis)

    def _room(self, name: str, *shape: int) -> Tensor:
        return self.scratch.take(name, shape, self.call.frozen.pool_QPN)

    def _read(self, kind: Kind, layer: int, x_CND: Tensor) -> None:
        """The arguments of a layer begin as W x."""
        own = slice(layer * self.call.rank, (layer + 1) * self.call.rank)
        arguments_MRCX, joint_SY = self.codes.arguments[kind][:, own], self.joint_LSY[kind][layer]
        members, rank, size, _ = arguments_MRCX.shape
        if kind != "token":
            product_SX = times_transposed(joint_SY, x_CND.flatten(0, 1))
            arguments_MRCX.copy_(product_SX.view(arguments_MRCX.shape))
        elif wide(joint_SY, x_CND[0].mT):
            for x_ND, arguments_MRD in zip(self._unmasked(x_CND), arguments_MRCX.unbind(2), strict=True):
                arguments_MRD.copy_(times_transposed(joint_SY, x_ND.mT).view(members, rank, -1))
        else:
            product_CSD = torch.bmm(joint_SY.expand(size, -1, -1), self._unmasked(x_CND))
            arguments_MRCX.copy_(product_CSD.unflatten(1, (members, rank)).movedim(0, 2))

    def _read_backward(self, kind: Kind, d_argument_MRCX: Tensor, x_CND: Tensor) -> Tensor:
        """The gradient of W: (M, R, Y)."""
        shape = d_argument_MRCX.shape[:2]
        if kind != "token":
            d_argument_SX = d_argument_MRCX.flatten(2).flatten(0, 1)
            return times_transposed(d_argument_SX, x_CND.flatten(0, 1).T).view(*shape, -1)
        d_argument_CSD = d_argument_MRCX.flatten(0, 1).transpose(0, 1)
        return each_times_transposed(d_argument_CSD, self._unmasked(x_CND)).sum(0).view(*shape, -1)

    def _unmasked(self, x_CND: Tensor) -> Tensor:
        """What token mixers read of x."""
        mask_CN = self.codes.mask_CN
        return x_CND if mask_CN is None else x_CND * mask_CN[..., None]

    def _x(self, layer: int) -> Tensor:
        """x_l = b_l + y_0: (C, N, D), in one piece of scratch."""
        tap, scale = self.taps[layer]
        self.x_CND.copy_(tap)
        if self.first_CND is None:
            return self.x_CND.mul_(scale)
        return torch.add(self.first_CND, self.x_CND, alpha=scale, out=self.x_CND)

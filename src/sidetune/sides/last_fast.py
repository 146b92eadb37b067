"""LAST with v in cache alone: outputs and gradients of `sidetune.sides.last`, nothing of v's size kept.

v_i = P_i + sum_{j<i} o_j W_j, with P_i = z_0 + .. + z_i and o_j what attention j puts out, is one running sum
a chunk of a few samples. A layer norm does not see a constant that is added to all channels of a token, so
z and W are centred over D, and with them v:

    LN(v) W_qkv  =  r (v W') + b      r = 1/sqrt(|v|^2 / D + eps),  W' = diag(gamma) W_qkv,  b = beta W_qkv
    pool(tokens) =  pool(z_L) + pool(O) W_all

Kept for backward: q, k, v of the attention, its output, what its softmax divides by, and r: 4R + 1 + heads
numbers a token. v itself is computed
again from the taps. The gradients are these lines differentiated by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sidetune.features import Features
from sidetune.sides.attention import attend, attend_backward
from sidetune.sides.base import every, frozen_taps, pool_weights
from sidetune.sides.chunks import of_rows, over_chunks
from sidetune.sides.products import times_transposed

if TYPE_CHECKING:
    from sidetune.sides.last import Last


@dataclass(frozen=True)
class Frozen:
    """What a call reads and does not train. I modules, one a tap.

    Args:
        taps: z_0 .. z_L (B, N, D), each with its scale, in any floating type; None where a module adds none.
        frames: T of clips, whose modules attend over space and over time in turn; None: over all tokens.
        pool_QPN: weights of pooling over tokens, Q = 1 or B.
        bias_B11N: -inf at tokens that are no keys, else 0; None where all are.
        keep_IMB: what drop-path multiplies a module's output by; None without.
        heads: of the attention.
        eps: of the layer norms.
        keep_last: whether z_L is part of the final tokens.
    """

    taps: Sequence[tuple[Tensor, float] | None]
    frames: int | None
    pool_QPN: Tensor
    bias_B11N: Tensor | None
    keep_IMB: Tensor | None
    heads: int
    eps: float
    keep_last: bool


class Matrices(NamedTuple):
    """What is trained, or its gradients, as the products need it.

    Args:
        qkv_MIDS: W', S = 3R columns; those of q with the scale of the attention.
        bias_MIS: b, likewise; of clips (M, I, T, S), with what the places in time add.
        centred_MIRD: W_out less its mean over D: what v sees.
        out_MIRD: W_out: what the final tokens see.
    """

    qkv_MIDS: Tensor
    bias_MIS: Tensor
    centred_MIRD: Tensor
    out_MIRD: Tensor


class Kept(NamedTuple):
    """What is kept for backward.

    Args:
        qkv_MIBNS: queries, keys and values.
        mixed_MIBNR: what attention puts out.
        rstd_MIBN: r.
        log_sum_MIBHN: what the softmax divides by, of each head.
    """

    qkv_MIBNS: Tensor
    mixed_MIBNR: Tensor
    rstd_MIBN: Tensor
    log_sum_MIBHN: Tensor

    def of(self, rows: slice, member: int) -> Kept:
        """One member's, of some samples: (I, C, N, ..)."""
        return Kept(*(tensor[member, :, rows] for tensor in self))


def pooled_last(side: Last, features: Features, keep_IMB: Tensor | None, eps: float) -> Tensor:
    """What `Side.forward` returns.

    Args:
        side: its parameters and switches.
        features: of its spec.
        keep_IMB: what drop-path multiplies a module's output by; None without.
        eps: of the layer norms.
    """
    taps = frozen_taps(side, features, ["embedding", *(tap.name for tap in side.blocks)])
    frozen = Frozen(
        taps=taps if side.frames is None else [one for tap in taps for one in (tap, None)],
        frames=side.frames,
        pool_QPN=pool_weights(side.spec.last, side.pool, features.mask, like=side.tap_scale),
        bias_B11N=None if features.mask is None else _bias(features.mask, side.tap_scale),
        keep_IMB=keep_IMB,
        heads=side.heads,
        eps=eps,
        keep_last=side.keep_last,
    )
    with torch.autocast(side.tap_scale.device.type, enabled=False):
        pooled_MBPD: Tensor = CachedLast.apply(frozen, *_matrices(side))
    return pooled_MBPD if side.pool == "tokens" else pooled_MBPD.flatten(2)


def _bias(mask_BN: Tensor, like: Tensor) -> Tensor:
    return like.new_zeros(mask_BN.shape).masked_fill_(~mask_BN, float("-inf"))[:, None, None]


def _matrices(side: Last) -> Matrices:
    modules = side.in_order
    qkv_MIDS = torch.stack(every(modules, "qkv_MDR"), 1)
    gamma_MID = torch.stack(every(modules, "norm_weight_MD"), 1)
    beta_MID = torch.stack(every(modules, "norm_bias_MD"), 1)
    out_MIRD = torch.stack(every(modules, "out_MRD"), 1)
    rank = out_MIRD.shape[2]
    scale_S = out_MIRD.new_ones(3 * rank)
    scale_S[:rank] = (rank // side.heads) ** -0.5
    qkv_MIDS = qkv_MIDS * scale_S
    if side.frames is None:
        bias_MIS = (beta_MID[:, :, None] @ qkv_MIDS)[:, :, 0]
    else:
        places_TD = places_in_time(side.frames, gamma_MID.shape[-1], like=gamma_MID)
        of_module = torch.stack([torch.zeros_like(places_TD), places_TD]).repeat(len(side.attention), 1, 1)
        bias_MIS = (beta_MID[:, :, None] + of_module) @ qkv_MIDS
    centred_MIRD = out_MIRD - out_MIRD.mean(-1, keepdim=True)
    return Matrices(gamma_MID[..., None] * qkv_MIDS, bias_MIS, centred_MIRD, out_MIRD)


class CachedLast(torch.autograd.Function):
    """pool(tokens), (M, B, P, D), from frozen taps and `Matrices`."""

    @staticmethod
    def forward(ctx: Any, frozen: Frozen, *tensors: Tensor) -> Tensor:  # noqa: ANN401 - PyTorch's own
        """`tensors` are the fields of `Matrices`."""
        matrices = Matrices(*tensors)
        (members, modules, rank, width) = matrices.out_MIRD.shape
        batch, num_tokens, _ = _first(frozen).shape
        new, tokens = matrices.out_MIRD.new_empty, (members, modules, batch, num_tokens)
        log_sum_MIBHN = new(members, modules, batch, frozen.heads, num_tokens)
        kept = Kept(new(*tokens, 3 * rank), new(*tokens, rank), new(*tokens), log_sum_MIBHN)
        out_MBPD = new(members, batch, frozen.pool_QPN.shape[1], width)

        def work(rows: slice) -> None:
            for m in range(members):
                out_MBPD[m, rows] = _Chunk(frozen, matrices, kept, rows, m).forward()

        over_chunks(work, batch, _scratch(out_MBPD, num_tokens, 3), out_MBPD.device)
        ctx.frozen = frozen
        ctx.save_for_backward(*matrices, *kept)
        return out_MBPD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_MBPD: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - PyTorch's own
        """Gradients of `Matrices`."""
        matrices, kept = Matrices(*ctx.saved_tensors[:4]), Kept(*ctx.saved_tensors[4:])
        members, modules, batch, num_tokens = kept.rstd_MIBN.shape

        def work(rows: slice) -> list[list[Tensor]]:
            chunks = (_Chunk(ctx.frozen, matrices, kept, rows, m) for m in range(members))
            return [chunk.backward(d_out_MBPD[m, rows]) for m, chunk in enumerate(chunks)]

        total = [torch.zeros_like(matrix) for matrix in matrices]
        scratch = _scratch(d_out_MBPD, num_tokens, modules + 4)
        for of_members in over_chunks(work, batch, scratch, d_out_MBPD.device):
            for m, gradients in enumerate(of_members):
                for into_MI, gradient in zip(total, gradients, strict=True):
                    into_MI[m] += gradient
        return (None, *total)


def _scratch(out_MBPD: Tensor, num_tokens: int, count: int) -> int:
    """Bytes that a sample of a chunk takes: so many tensors of a tap's size."""
    return count * num_tokens * out_MBPD.shape[-1] * out_MBPD.element_size()


class _Chunk:
    """C samples of a batch on their way through all modules of one member and back.

    Views are made for all modules at once: one view costs Python as much as one of the small products.
    """

    def __init__(self, frozen: Frozen, matrices: Matrices, kept: Kept, rows: slice, member: int) -> None:
        self.frozen = frozen
        self.qkv_IDS, bias, self.centred_IRD, self.out_IRD = (one[member] for one in matrices)
        self.qkv_ICNS, self.mixed_ICNR, self.rstd_ICN, self.log_sum_ICHN = kept.of(rows, member)
        self.taps = [None if one is None else (one[0][rows], one[1]) for one in frozen.taps]
        self.size, (_, num_tokens, self.width) = rows.stop - rows.start, _first(frozen).shape
        self.pool_CPN = of_rows(frozen.pool_QPN, 0, rows).expand(self.size, -1, -1)
        # of a clip each frame's tokens have their own
        self.bias_INS = (
            bias[:, None] if bias.ndim == 2 else bias.repeat_interleave(num_tokens // bias.shape[1], 1)
        )
        bias_C11N = None if frozen.bias_B11N is None else frozen.bias_B11N[rows]
        self.biases = self._biases(bias_C11N)
        self.keep_IC = None if frozen.keep_IMB is None else frozen.keep_IMB[:, member, rows]
        self.z_CND = matrices.out_MIRD.new_empty(self.size, num_tokens, self.width)

    def forward(self) -> Tensor:
        """pool(tokens): (C, P, D). Writes what is kept."""
        v_CND = torch.zeros_like(self.z_CND)
        v_XD = v_CND.flatten(0, 1)
        q, k, v = self._queries_keys_values()
        mixed, log_sum = self._heads(self.mixed_ICNR), self._log_sums()
        weights_SD, biases, up_DR = (
            self.qkv_IDS.mT.unbind(),
            self.bias_INS.unbind(),
            self.centred_IRD.mT.unbind(),
        )
        for i, (qkv_CNS, rstd_CN) in enumerate(zip(self.qkv_ICNS, self.rstd_ICN, strict=True)):
            self._add_tap(i, v_CND, v_CND)
            squares_CN = torch.linalg.vector_norm(v_CND, dim=-1).square_()
            torch.rsqrt(squares_CN.div_(self.width).add_(self.frozen.eps), out=rstd_CN)
            product_CNS = times_transposed(v_XD, weights_SD[i]).view_as(qkv_CNS)
            torch.addcmul(biases[i], product_CNS, rstd_CN[..., None], out=qkv_CNS)
            mixed_CHNE, log_sum_CHN = attend(_whole(q[i]), _whole(k[i]), _whole(v[i]), self.biases[i % 2])
            mixed[i].copy_(mixed_CHNE.view_as(mixed[i]))
            log_sum[i].copy_(log_sum_CHN.view_as(log_sum[i]))
            v_XD += times_transposed(self._dropped(i, self.mixed_ICNR[i]).flatten(0, 1), up_DR[i])
        pooled_ICPR = self.pool_CPN @ self._dropped(slice(None), self.mixed_ICNR)
        out_CPD = pooled_ICPR.movedim(0, 2).flatten(2) @ self.out_IRD.flatten(0, 1)
        if self.frozen.keep_last:
            tap, scale = next(one for one in reversed(self.taps) if one is not None)
            out_CPD += torch.bmm(self.pool_CPN, self.z_CND.copy_(tap)).mul_(scale)
        return out_CPD

    def backward(self, d_out_CPD: Tensor) -> list[Tensor]:
        """Gradients of this member's `Matrices` from these samples."""
        mixed_ICNR = self._dropped(slice(None), self.mixed_ICNR)
        v_ICND = self._all_v(mixed_ICNR)
        d_v_CND = torch.zeros_like(self.z_CND)
        d_v_XD, v_IDX = d_v_CND.flatten(0, 1), v_ICND.flatten(1, 2).mT.unbind()
        d_v_DX = d_v_XD.T
        pooled_ICPR = self.pool_CPN @ mixed_ICNR
        d_out_IRD = pooled_ICPR.flatten(1, 2).mT @ d_out_CPD.flatten(0, 1)
        d_mixed_ICNR = self.pool_CPN.mT @ (d_out_CPD @ self.out_IRD[:, None].mT)
        mixed_IRX, norms = mixed_ICNR.flatten(1, 2).mT.unbind(), self._norms()
        d_heads, d_mixed_IXR = self._heads(d_mixed_ICNR), d_mixed_ICNR.flatten(1, 2).unbind()
        attention = self._attention()
        d_weights, d_biases, d_ups = [], [], []
        for i in reversed(range(len(self.taps))):
            d_ups.append(times_transposed(mixed_IRX[i], d_v_DX))
            d_mixed_IXR[i].add_(times_transposed(d_v_XD, self.centred_IRD[i]))
            d_mixed_CHNE = _whole(self._dropped(i, d_heads[i]))
            of_heads = attend_backward(d_mixed_CHNE, *attention[i], self.biases[i % 2])
            d_qkv_CNS = self._joined(i, of_heads)
            d_biases.append(self._bias_gradient(d_qkv_CNS))
            by_rstd_CNS, rstd_CN1 = norms[i]
            d_v_CND.addcmul_(v_ICND[i], (by_rstd_CNS * d_qkv_CNS).sum(-1, keepdim=True))
            d_product_XS = (d_qkv_CNS * rstd_CN1).flatten(0, 1)
            d_weights.append(times_transposed(d_product_XS.T, v_IDX[i]))
            d_v_XD += times_transposed(d_product_XS, self.qkv_IDS[i])
        d_qkv_ISD, d_bias_IS, d_centred_IRD = (torch.stack(one[::-1]) for one in (d_weights, d_biases, d_ups))
        return [d_qkv_ISD.mT, d_bias_IS, d_centred_IRD, d_out_IRD]

    def _add_tap(self, i: int, v_CND: Tensor, into_CND: Tensor) -> None:
        """Add z_i, centred over D, where module i has one."""
        if (own := self.taps[i]) is None:
            if into_CND is not v_CND:
                into_CND.copy_(v_CND)
            return
        tap, scale = own
        self.z_CND.copy_(tap)
        self.z_CND.sub_(self.z_CND.mean(-1, keepdim=True))
        torch.add(v_CND, self.z_CND, alpha=scale, out=into_CND)

    def _all_v(self, mixed_ICNR: Tensor) -> Tensor:
        """v_0 .. v_L again: (I, C, N, D)."""
        v_ICND = self.z_CND.new_empty(len(self.taps), *self.z_CND.shape)
        mixed_IXR, up_DR = mixed_ICNR.flatten(1, 2).unbind(), self.centred_IRD.mT.unbind()
        before_CND = torch.zeros_like(self.z_CND)
        for i, v_CND in enumerate(v_ICND):
            self._add_tap(i, before_CND, v_CND)
            if i:
                v_CND.flatten(0, 1).add_(times_transposed(mixed_IXR[i - 1], up_DR[i - 1]))
            before_CND = v_CND
        return v_ICND

    def _dropped(self, i: int | slice, tensor: Tensor) -> Tensor:
        """What drop-path leaves of a module's output, or of its gradient."""
        if self.keep_IC is None:
            return tensor
        keep = self.keep_IC[i]
        return tensor * keep.view(*keep.shape, *[1] * (tensor.ndim - keep.ndim))

    def _heads(self, tensor_ICNR: Tensor) -> Sequence[Tensor]:
        """A (C, heads, N, R / heads) a module; of clips (C, T, heads, S, ..) or (C, S, heads, T, ..)."""
        heads: Tensor = tensor_ICNR.unflatten(-1, (self.frozen.heads, -1)).transpose(2, 3)
        return self._in_turn(heads)

    def _log_sums(self) -> Sequence[Tensor]:
        """A (C, heads, N) a module; of clips likewise."""
        return [one[..., 0] for one in self._in_turn(self.log_sum_ICHN[..., None])]

    def _in_turn(self, heads_ICHNE: Tensor) -> Sequence[Tensor]:
        """Each module's, of the tokens that it attends over."""
        if self.frozen.frames is None:
            return heads_ICHNE.unbind()
        clips_ICHTSE = heads_ICHNE.unflatten(3, (self.frozen.frames, -1))
        space = clips_ICHTSE[::2].permute(0, 1, 3, 2, 4, 5)
        time = clips_ICHTSE[1::2].permute(0, 1, 4, 2, 3, 5)
        return [one for pair in zip(space, time, strict=False) for one in pair]

    def _biases(self, bias_C11N: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Of modules with even and with odd numbers."""
        if bias_C11N is None or self.frozen.frames is None:
            return bias_C11N, bias_C11N
        bias_CTS = bias_C11N[:, 0, 0].unflatten(1, (self.frozen.frames, -1))
        return bias_CTS.flatten(0, 1)[:, None, None], bias_CTS.mT.flatten(0, 1)[:, None, None]

    def _queries_keys_values(self) -> list[Sequence[Tensor]]:
        return [self._heads(part) for part in self.qkv_ICNS.chunk(3, -1)]

    def _attention(self) -> list[tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """What `attend` got and gave, of each module."""
        q, k, v = self._queries_keys_values()
        mixed, log_sum = self._heads(self.mixed_ICNR), self._log_sums()
        return [
            ((_whole(q[i]), _whole(k[i]), _whole(v[i])), (_whole(mixed[i]), _whole(log_sum[i], 3)))
            for i in range(len(q))
        ]

    def _joined(self, i: int, of_heads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """What a module's attention gives for q, k and v as one (C, N, S)."""
        if self.frozen.frames is None:
            return _joined(of_heads)
        clips = [one.unflatten(0, (self.size, -1)) for one in of_heads]  # (C, T or N / T, heads, ..)
        order = (0, 3, 1, 2, 4) if i % 2 else (0, 1, 3, 2, 4)
        return torch.cat([one.permute(*order).flatten(3).flatten(1, 2) for one in clips], -1)

    def _bias_gradient(self, d_qkv_CNS: Tensor) -> Tensor:
        """(S,), or (T, S) of clips."""
        if self.frozen.frames is None:
            return d_qkv_CNS.sum((0, 1))
        of_frames: Tensor = d_qkv_CNS.unflatten(1, (self.frozen.frames, -1))
        return of_frames.sum((0, 2))

    def _norms(self) -> list[tuple[Tensor, Tensor]]:
        """Of each module what the gradient of q, k, v meets on its way to v by r, (C, N, S); and r itself.

        The gradient of |v|^2 is -r^2 / (2D) sum_S (qkv - b) d_qkv, and that of v is 2v times as much.
        """
        rstd_ICN1 = self.rstd_ICN[..., None]
        unbiased_ICNS = self.qkv_ICNS - self.bias_INS[:, None]
        by_rstd_ICNS = unbiased_ICNS.mul_(rstd_ICN1.square().div_(-self.width))
        return list(zip(by_rstd_ICNS.unbind(), rstd_ICN1.unbind(), strict=True))


def places_in_time(frames: int, width: int, *, like: Tensor) -> Tensor:
    """Sines and cosines of T places, in waves of 1 to 10,000 frames: (T, D)."""
    waves = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles_TW = torch.arange(frames, dtype=torch.float64)[:, None] * 10_000.0**-waves
    places_TD = torch.stack([angles_TW.sin(), angles_TW.cos()], -1).flatten(1)[:, :width]
    places: Tensor = places_TD.to(like)
    return places


def _first(frozen: Frozen) -> Tensor:
    """The embedding."""
    assert frozen.taps[0] is not None, "the first module adds the embedding"
    return frozen.taps[0][0]


def _whole(heads: Tensor, ndim: int = 4) -> Tensor:
    """(C, .., heads, N, R / heads) with one axis of sequences: a copy where these do not lie evenly."""
    return heads if heads.ndim == ndim else heads.flatten(0, 1)


def _joined(of_heads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Three (C, heads, N, R / heads) as one (C, N, S)."""
    if of_heads[0].shape[1] == 1:
        return torch.cat(of_heads, -1)[:, 0]
    return torch.cat([part.transpose(1, 2).flatten(2) for part in of_heads], -1)

"""What every side network is: a module that reads `Features` and returns pooled tokens.

Common to all sides: ``logits = Head(Norm(Pool(tokens)))``. A side computes ``Pool(tokens)``; norm and
head stand in `sidetune.model`. Every parameter has a leading member axis M: training one network is
M = 1, so solo and fleet are one code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from sidetune.errors import SideError, nearest
from sidetune.features import Features, Spec, Tap
from sidetune.keyed import Draws, generator

Pool = Literal["mean", "cls", "cls+mean", "all", "tokens"]
Form = Literal["fast", "textbook"]
Time = Literal["divided", "joint"]


class SideRecipe(BaseModel):
    """What every side's own recipe shares. The fields are the side's keyword arguments.

    Args:
        name: the side network; ``--side``.
        pool: of the final tokens: the ``mean`` of patch tokens, ``cls``, ``cls+mean`` concatenated, or the
            mean of ``all`` tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    usual_decay: ClassVar[float | None] = None  # AdamW's where the recipe has none; None: by the steps

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the side's constructor."""
        return self.model_dump(exclude={"name"})


class Side(nn.Module, ABC):
    """A side network over the taps of a frozen backbone.

    Args:
        spec: the taps of the features it will be given.
        members: M, networks trained together.
        pool: ``mean`` of patch tokens, ``cls``, ``cls+mean`` concatenated, mean of ``all`` tokens, or
            ``tokens``: no pooling, for tasks that ask for tokens.
        out: the tap whose shape the final tokens have; None: the last of `spec`.

    A side's `tap_scale` (one number a tap, ones until measured) multiplies each tap as it is read.
    A side of the ``fast`` form gives threads their work itself (`sidetune.sides.chunks`).
    """

    tap_scale: Tensor
    form: Form = "textbook"

    def __init__(self, spec: Spec, *, members: int = 1, pool: Pool = "mean", out: Tap | None = None) -> None:
        super().__init__()
        self.out = spec.last if out is None else out
        if pool not in get_args(Pool):
            raise SideError(f"pool is {pool!r}.{nearest(pool, get_args(Pool))} Type: --set side.pool=mean")
        if pool in ("cls", "cls+mean") and self.out.cls_index is None:
            raise SideError(
                f"pool {pool!r} needs a class token and this backbone has none. Type: --set side.pool=mean"
            )
        self.spec, self.members, self.pool = spec, members, pool
        self.register_buffer("tap_scale", torch.ones(len(spec)))

    @classmethod
    def reads(cls, spec: Spec) -> Spec:
        """The taps of `spec` that this side reads: all, unless the side says otherwise."""
        return spec

    @property
    def width(self) -> int:
        """Width of what `forward` returns: D, or 2D for ``cls+mean``."""
        return self.out.width * (2 if self.pool == "cls+mean" else 1)

    @property
    def halves(self) -> int:
        """How many vectors of width D are concatenated in the output; each is normed on its own."""
        return 2 if self.pool == "cls+mean" else 1

    @abstractmethod
    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """The side's final tokens, before pooling: (M, B, N, D), or (1, B, N, D) if M share them."""

    def forward(self, features: Features, draws: Draws | None = None) -> Tensor:
        """Pool(tokens).

        Args:
            features: of this side's spec.
            draws: the keyed randomness of a training step; None outside training.

        Returns:
            (M, B, width), or (M, B, N, D) with pool ``tokens``.
        """
        pooled = pool_tokens(self.tokens(features, draws), self.out, self.pool, features.mask)
        return pooled.expand(self.members, *pooled.shape[1:])

    def shares(self, features: Features) -> Tensor | None:
        """What each token adds to the pooled vector: (M or 1, B, N, width), whose sum over N is `forward`.

        None where pooling is no such sum. Outside training.
        """
        return token_shares(self.tokens(features), self.out, self.pool, features.mask)

    def pooled_product(self, codes_MBNK: Tensor, up_MKD: Tensor, features: Features) -> Tensor:
        """Pool(codes up), the codes pooled before the product: (M, B, width).

        Args:
            codes_MBNK: of every token.
            up_MKD: K -> D.
            features: that the codes are of.
        """
        pooled_MBW = pool_tokens(codes_MBNK, self.out, self.pool, features.mask)
        halves_MBHK = pooled_MBW.unflatten(-1, (self.halves, -1))
        return member_products(halves_MBHK, up_MKD).flatten(-2)

    def scaled(self, features: Features, name: str) -> Tensor:
        """A tap times its scale: (B, N, D), at least in the precision of the side."""
        tap, scale = features[name], self.tap_scale[self.spec.index(name)]
        dtype = torch.promote_types(tap.dtype, scale.dtype)
        return tap.to(dtype) * scale.to(dtype)

    def branch_keep(
        self, rates: Sequence[float], count: int, features: Features, draws: Draws | None
    ) -> Tensor | None:
        """What drop-path multiplies branches by: (count, M, B); None where none is dropped.

        Args:
            rates: probability that a sample skips a branch in training, one a member.
            count: of branches.
            features: of the batch.
            draws: the step's.
        """
        if not (self.training and any(rates)):
            return None
        assert draws is not None, "drop-path needs the step's draws"
        device = self.tap_scale.device
        keeps = [draws.keep(f"drop-path/{i}", rates, len(features), device) for i in range(count)]
        return torch.stack(keeps).to(self.tap_scale.dtype)

    def start(self, seeds: Sequence[int | None]) -> None:
        """Draw every member's starting parameters from its own seed.

        Args:
            seeds: one a member; None leaves it as it is. Members of equal seed start equal.
        """
        assert len(seeds) == self.members, (len(seeds), self.members)
        for member, seed in enumerate(seeds):
            if seed is None:
                continue
            keyed = generator(seed, "start")
            for module in self.modules():
                if isinstance(module, MemberModule):
                    module.start_member(member, keyed)

    def rest(self) -> None:
        """Let go of memory that is kept from one step to the next."""

    def frozen(self) -> Iterator[Tensor]:
        """Tensors of the backbone that it runs itself: none, but for baselines."""
        yield from ()

    def num_parameters(self) -> int:
        """Trained numbers a member, without norm and head."""
        return sum(parameter.numel() for parameter in self.parameters()) // self.members


class MemberModule(nn.Module):
    """A part of a side whose parameters have a leading member axis and a keyed start."""

    def start_member(self, member: int, keyed: torch.Generator) -> None:
        """Draw the starting parameters of one member, in a fixed order."""
        raise NotImplementedError


def frozen_taps(side: Side, features: Features, names: Sequence[str]) -> list[tuple[Tensor, float]]:
    """Taps, as they travel, each with its scale.

    Raises:
        SideError: one wants a gradient, which a fast form does not give.
    """
    for name in names:
        if features[name].requires_grad:
            raise SideError(
                f"tap {name!r} wants a gradient, and the fast form gives none: the backbone is frozen. "
                "Type: --set side.form=textbook, or compute the features under torch.no_grad()"
            )
    scales = side.tap_scale.tolist()
    return [(features[name], scales[side.spec.index(name)]) for name in names]


def every(modules: nn.ModuleList, name: str) -> list[Tensor]:
    """The parameter of this name of each module."""
    return [getattr(module, name) for module in modules]


def normal_start(parameter: Tensor, member: int, fan_in: int, keyed: torch.Generator) -> None:
    """Fill one member's slice from a normal with std 1/sqrt(fan_in)."""
    with torch.no_grad():
        draw = torch.randn(parameter.shape[1:], generator=keyed, dtype=torch.float32)
        parameter[member] = (draw * fan_in**-0.5).to(parameter)


def member_products(x_MBNI: Tensor, weight_MIO: Tensor) -> Tensor:
    """Every member's tokens times its own matrix: (M, B, N, O).

    What all members share is one wide product. `torch.matmul` would copy it a member, and a matrix a sample.

    Args:
        x_MBNI: (M, B, N, I), or (1, B, N, I) that members share.
        weight_MIO: (M, I, O).
    """
    members, width, out = weight_MIO.shape
    _, batch, num_tokens, _ = x_MBNI.shape
    if x_MBNI.shape[0] == members:
        return torch.bmm(x_MBNI.flatten(1, 2), weight_MIO).view(members, batch, num_tokens, out)
    wide = x_MBNI.flatten(0, 2) @ weight_MIO.transpose(0, 1).reshape(width, members * out)
    return wide.view(batch, num_tokens, members, out).permute(2, 0, 1, 3)


def pool_tokens(tokens: Tensor, tap: Tap, pool: Pool, mask: Tensor | None = None) -> Tensor:
    """Pool (.., B, N, D) over tokens: (.., B, D), (.., B, 2D) for ``cls+mean``.

    Args:
        tokens: final tokens of a side, or a tap.
        tap: says which tokens are prefix tokens.
        pool: see `Side`.
        mask: (B, N) bool, True where a token counts.
    """
    if pool == "tokens":
        return tokens
    if pool == "cls":
        return tap.cls_token(tokens)
    if pool == "all":
        return _mean(tokens, mask)
    patch_mask = None if mask is None else tap.patch_tokens(mask[..., None])[..., 0]
    mean = _mean(tap.patch_tokens(tokens), patch_mask)
    return mean if pool == "mean" else torch.cat([tap.cls_token(tokens), mean], -1)


def token_shares(tokens: Tensor, tap: Tap, pool: Pool, mask: Tensor | None = None) -> Tensor | None:
    """`pool_tokens` before its sum: (.., B, N, width); None for ``tokens``. Args as there."""
    if pool == "tokens":
        return None
    weights_QPN = pool_weights(tap, pool, mask, like=tokens)
    return torch.cat([tokens * weight_QN[..., None] for weight_QN in weights_QPN.unbind(1)], -1)


def pool_weights(tap: Tap, pool: Pool, mask: Tensor | None, *, like: Tensor) -> Tensor:
    """What `pool_tokens` multiplies tokens by before it sums: (Q, P, N), Q = 1, or B with a mask.

    P vectors of width D come out: two with ``cls+mean``, all N with ``tokens``.

    Args:
        tap: as for `pool_tokens`, like `pool` and `mask`.
        pool: see `Side`.
        mask: (B, N) bool.
        like: has the type and the device of what is asked for.
    """
    if pool == "tokens":
        return torch.eye(tap.num_tokens, dtype=like.dtype, device=like.device)[None]
    units = torch.arange(tap.num_tokens, device=like.device).view(tap.num_units, -1)
    is_cls_N, is_patch_N = like.new_zeros(tap.num_tokens), like.new_ones(tap.num_tokens)
    is_patch_N[units[:, : tap.num_prefix]] = 0
    if tap.cls_index is not None:
        is_cls_N[units[:, tap.cls_index]] = 1 / tap.num_units
    counts_QN = like.new_ones(1, tap.num_tokens) if mask is None else mask.to(like)
    chosen_QN = counts_QN if pool == "all" else counts_QN * is_patch_N
    mean_QN = chosen_QN / chosen_QN.sum(-1, keepdim=True).clamp(min=1)
    cls_QN = is_cls_N.expand_as(mean_QN)
    return torch.stack({"cls": [cls_QN], "cls+mean": [cls_QN, mean_QN]}.get(pool, [mean_QN]), 1)


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return tokens.mean(-2)
    weight = mask.to(tokens.dtype)[..., None]
    return (tokens * weight).sum(-2) / weight.sum(-2).clamp(min=1)


def member_rates(drop_path: float | Sequence[float], members: int) -> tuple[float, ...]:
    """Drop-path's rate of each member.

    Args:
        drop_path: one for all, or one a member.
        members: M.

    Raises:
        SideError: not one a member, or one is no probability below 1.
    """
    rates = (drop_path,) * members if isinstance(drop_path, int | float) else tuple(drop_path)
    if len(rates) != members:
        raise SideError(
            f"drop_path has {len(rates)} rates, expected one number or one for each of {members} members. "
            "Type: drop_path=0.0"
        )
    for rate in rates:
        if not 0 <= rate < 1:
            raise SideError(f"drop_path is {rate:g}, expected 0 or more and less than 1. Type: drop_path=0.1")
    return rates


def known_form(form: Form) -> Form:
    """The form itself.

    Raises:
        SideError: there is no such form.
    """
    if form not in get_args(Form):
        raise SideError(f"form is {form!r}.{nearest(form, get_args(Form))} Type: --set side.form=fast")
    return form


def divided_frames(tap: Tap, time: Time) -> int | None:
    """T where space and time are mixed one after the other; None of an image, or where they are joint.

    Args:
        tap: whose tokens they are.
        time: as asked for.

    Raises:
        SideError: there is no such way, or a clip's prefix tokens belong to no frame.
    """
    if time not in get_args(Time):
        raise SideError(f"time is {time!r}.{nearest(time, get_args(Time))} Type: --set side.time=divided")
    if time == "joint" or tap.grid[0] == 1:
        return None
    if tap.num_prefix and tap.prefix_per == "clip":
        raise SideError(
            f"tap {tap.name} has {tap.num_prefix} prefix tokens a clip, which are of no frame, and "
            "side.time=divided mixes those of a frame. Type: --set side.time=joint"
        )
    return tap.grid[0]


def kept_blocks(spec: Spec, every: int, side: str) -> tuple[Tap, ...]:
    """Every k-th block tap counted back from L, in running order; all of one width and grid.

    Where ``backbone.taps`` names outputs of attention or feed-forward branches, these are read like
    blocks, each in its place; what stands last is b_L, so name ``block.L``, too.

    Raises:
        SideError: no block is tapped, or their shapes differ.
    """
    read = tuple(tap for tap in spec.taps if tap.kind in ("block", "attention", "ffn"))
    if not read:
        raise SideError(
            f"{side} reads block taps and got {', '.join(spec.names)}. Type: --set backbone.taps=null"
        )
    if every < 1:
        raise SideError(f"every is {every}, expected 1 or more. Type: --set side.every=1")
    kept = tuple(reversed(read[::-1][::every]))
    if len({(tap.width, tap.num_tokens) for tap in kept}) > 1:
        shapes = ", ".join(f"{tap.name} {tap.num_tokens}x{tap.width}" for tap in kept)
        raise SideError(
            f"{side} needs block taps of one width and one grid, got {shapes}. Type: --side ridge"
        )
    return kept


def need_embedding(spec: Spec, side: str) -> None:
    """Refuse taps without the embedding.

    Raises:
        SideError: there is none.
    """
    if "embedding" not in spec.names:
        raise SideError(
            f"{side} reads the tap 'embedding' and got {', '.join(spec.names)}. "
            "Type: --set backbone.taps=null"
        )

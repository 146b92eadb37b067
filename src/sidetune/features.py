"""The words every other file uses: where features are tapped, and the features themselves.

Shape legend, used as suffixes of tensor names throughout:

    B  batch                    N  tokens a sample: prefix + T*H*W
    D  width                    T, H, W  the grid of patch tokens (T = 1 for an image)
    R  rank                     K  classes, or outputs of a multi-label or regression task
    L  blocks of the backbone   M  members: side networks trained together

A *tap* is one place in the backbone that is read. Tap ``embedding`` is z_0, the tokens that enter
the first block; tap ``block.l`` is b_l, the pre-norm output of block l = 1..L. A *spec* is the
tuple of taps, known before anything runs. `Features` holds one tensor (B, N, D) a tap and is the
only type in which features travel, whether they come live from a backbone or from a store.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from sidetune.errors import RequestError, nearest

TapKind = Literal["image", "embedding", "block", "attention", "ffn"]
PrefixPer = Literal["clip", "frame"]


@dataclass(frozen=True)
class Tap:
    """One place in the backbone that is read.

    Args:
        name: unique in a spec: ``image``, ``embedding``, ``block.1`` .. ``block.L``, ``attention.l``,
            ``ffn.l``.
        kind: what is read there: the prepared image, whose tokens are pixels of width 3; the embedding
            z_0; the residual stream after a block; or the output of a block's attention or
            feed-forward branch before the residual sum.
        width: D, channels a token.
        grid: (T, H, W) of the patch tokens. T counts tokens, not frames.
        num_prefix: class, distillation and register tokens in front of each unit.
        prefix_per: the unit that has its own prefix tokens.
        cls_index: position of the class token among the prefix tokens, None where there is none.
    """

    name: str
    kind: TapKind
    width: int
    grid: tuple[int, int, int]
    num_prefix: int = 0
    prefix_per: PrefixPer = "clip"
    cls_index: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(TapKind):
            raise RequestError(
                f"tap {self.name!r} has kind {self.kind!r}.{nearest(self.kind, get_args(TapKind))}"
            )
        if self.prefix_per not in get_args(PrefixPer):
            raise RequestError(
                f"tap {self.name!r} has prefix_per {self.prefix_per!r}."
                f"{nearest(self.prefix_per, get_args(PrefixPer))}"
            )
        if self.width < 1 or len(self.grid) != 3 or min(self.grid) < 1 or self.num_prefix < 0:
            raise RequestError(
                f"tap {self.name!r} has width {self.width}, grid {self.grid}, num_prefix "
                f"{self.num_prefix}; expected positive sizes and a grid (T, H, W)"
            )
        if self.cls_index is not None and not 0 <= self.cls_index < self.num_prefix:
            raise RequestError(
                f"tap {self.name!r} has cls_index {self.cls_index} but num_prefix "
                f"{self.num_prefix}; expected None or an index below num_prefix"
            )

    @property
    def num_units(self) -> int:
        """Units that carry their own prefix tokens: 1 a clip, or one a step of T."""
        return self.grid[0] if self.prefix_per == "frame" else 1

    @property
    def num_tokens(self) -> int:
        """N: prefix and patch tokens together."""
        return self.num_units * self.num_prefix + math.prod(self.grid)

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        """The patch tokens of (.., N, D): (.., T*H*W, D)."""
        if self.num_units == 1:
            return tokens[..., self.num_prefix :, :]
        units: Tensor = tokens.unflatten(-2, (self.num_units, -1))
        return units[..., self.num_prefix :, :].flatten(-3, -2)

    def cls_token(self, tokens: Tensor) -> Tensor:
        """The class token of (.., N, D), averaged over units: (.., D)."""
        if self.cls_index is None:
            raise RequestError(f"tap {self.name!r} has no class token. Type: --set side.pool=mean")
        if self.num_units == 1:
            return tokens[..., self.cls_index, :]
        units: Tensor = tokens.unflatten(-2, (self.num_units, -1))
        return units[..., self.cls_index, :].mean(-2)


@dataclass(frozen=True)
class Spec:
    """The taps of a backbone in running order, known before anything runs."""

    taps: tuple[Tap, ...]

    def __post_init__(self) -> None:
        names = [tap.name for tap in self.taps]
        if not names or len(set(names)) != len(names):
            raise RequestError(f"a spec needs at least one tap and unique names, got {names}")

    def __len__(self) -> int:
        return len(self.taps)

    @property
    def names(self) -> tuple[str, ...]:
        """Tap names in running order."""
        return tuple(tap.name for tap in self.taps)

    @property
    def blocks(self) -> tuple[Tap, ...]:
        """The block taps b_1 .. b_L that are present, in running order."""
        return tuple(tap for tap in self.taps if tap.kind == "block")

    @property
    def last(self) -> Tap:
        """The last tap in running order: b_L, unless a branch tapped after block L - 1 stands last."""
        return self.taps[-1]

    def index(self, name: str) -> int:
        """Position of a tap.

        Raises:
            RequestError: there is no such tap.
        """
        if name not in self.names:
            raise RequestError(f"no tap named {name!r}.{nearest(name, self.names)}")
        return self.names.index(name)

    def select(self, names: Iterable[str]) -> Spec:
        """The spec with only these taps, kept in running order."""
        wanted = {self.index(name) for name in names}
        return Spec(tuple(self.taps[i] for i in sorted(wanted)))

    def of_clips(self, frames: int) -> Spec:
        """The spec of clips whose frames each have the tokens of this one: T = frames, a prefix a frame.

        Args:
            frames: T of a clip, one or more.
        """
        taps = [
            replace(tap, grid=(frames * tap.grid[0], *tap.grid[1:]), prefix_per="frame") for tap in self.taps
        ]
        return Spec(tuple(taps))

    def record_numel(self) -> int:
        """Numbers that one sample's features hold."""
        return sum(tap.num_tokens * tap.width for tap in self.taps)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain lists and dicts, for manifests and artifacts."""
        return [{**asdict(tap), "grid": list(tap.grid)} for tap in self.taps]

    @classmethod
    def from_json(cls, taps: Sequence[dict[str, Any]]) -> Self:
        """The inverse of `to_json`."""
        return cls(tuple(Tap(**{**tap, "grid": tuple(tap["grid"])}) for tap in taps))


@dataclass(frozen=True)
class Features:
    """What a backbone computed for a batch: one tensor a tap, and which tokens count.

    Args:
        layers: a tuple of (B, N_l, D_l), one a tap of `spec`, in its order.
        spec: the taps.
        mask: (B, N) bool, True where a token counts; None where all do.

    Raises:
        RequestError: shapes do not follow the spec.
    """

    layers: tuple[Tensor, ...]
    spec: Spec
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.spec):
            raise RequestError(f"got {len(self.layers)} layers, expected {len(self.spec)} taps")
        for layer, tap in zip(self.layers, self.spec.taps, strict=True):
            expected = (len(self), tap.num_tokens, tap.width)
            if tuple(layer.shape) != expected:
                raise RequestError(
                    f"tap {tap.name!r} has shape {tuple(layer.shape)}, expected (B, N, D) = "
                    f"{expected}: grid {tap.grid}, {tap.num_prefix} prefix tokens"
                )
        if self.mask is not None and (
            self.mask.dtype != torch.bool or tuple(self.mask.shape) != tuple(self.layers[0].shape[:2])
        ):
            raise RequestError(
                f"mask is {self.mask.dtype} {tuple(self.mask.shape)}, expected torch.bool "
                f"{tuple(self.layers[0].shape[:2])}"
            )

    def __len__(self) -> int:
        return self.layers[0].shape[0]

    def __getitem__(self, name: str) -> Tensor:
        return self.layers[self.spec.index(name)]

    def select(self, names: Iterable[str]) -> Features:
        """Only these taps, in running order."""
        spec = self.spec.select(names)
        return Features(tuple(self[name] for name in spec.names), spec, self.mask)

    def of_clips(self, frames: int) -> Features:
        """Features of frames as those of clips: (B * T, N, D) becomes (B, T * N, D).

        Args:
            frames: T of a clip, which follow one another.
        """
        layers = tuple(layer.unflatten(0, (-1, frames)).flatten(1, 2) for layer in self.layers)
        mask = None if self.mask is None else self.mask.unflatten(0, (-1, frames)).flatten(1, 2)
        return Features(layers, self.spec.of_clips(frames), mask)

    def rows(self, rows: Tensor | slice) -> Features:
        """Only these samples of the batch."""
        mask = None if self.mask is None else self.mask[rows]
        return Features(tuple(layer[rows] for layer in self.layers), self.spec, mask)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Features:
        """The same features on another device or in another precision."""
        layers = tuple(layer.to(device, dtype) for layer in self.layers)
        return Features(layers, self.spec, None if self.mask is None else self.mask.to(device))


@dataclass(frozen=True)
class FinalNorm:
    """The backbone's own last LayerNorm, copied: weight (D,), bias (D,), eps.

    Kept with the store and the artifact, so that a head can be applied to pooled taps without
    the backbone at hand.
    """

    weight: Tensor
    bias: Tensor
    eps: float

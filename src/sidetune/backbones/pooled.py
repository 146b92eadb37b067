"""Fewer tokens of any backbone: the mean of k x k neighbours in the place of each patch token.

A store is k² times smaller, but for prefix tokens, which stay as they are. For clips, whose frames say much
the same, and for whoever has little room.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from sidetune.backbones.base import Backbone, Stages
from sidetune.errors import BackboneError
from sidetune.features import Features, Spec, Tap


class PooledBackbone(Backbone):
    """Another backbone with its patch tokens averaged, k x k of a frame into one.

    The tap of the image's pixels stays as it is. The identity knows k: a store or a side of one k is refused
    for another.

    Args:
        inner: any backbone; its weights are shared.
        by: k, which divides H and W of every grid.

    Raises:
        BackboneError: a k that is less than 2, or that does not divide a grid.
    """

    def __init__(self, inner: Backbone, by: int) -> None:
        self.inner, self.by = inner, checked(by)
        patch = inner.identity.arguments.get("patch")
        self.spec = Spec(tuple(_smaller(tap, by, patch) for tap in inner.spec.taps))
        arguments = {**inner.identity.arguments}
        arguments["pooled"] = by * arguments.get("pooled", 1)  # a mean of means of as many is their mean
        self.identity = replace(inner.identity, arguments=arguments)
        self.preprocess, self.variant, self.norm = inner.preprocess, inner.variant, inner.norm
        self.device, self.frames = inner.device, inner.frames
        self._dtype: torch.dtype | None = None

    def __call__(self, images: Tensor) -> Features:
        """See `Backbone.__call__`."""
        read = self.inner(images)
        means = (pooled(layer, tap, self.by) for layer, tap in zip(read.layers, read.spec.taps, strict=True))
        given = means if self._dtype is None else (layer.to(self._dtype) for layer in means)
        return Features(tuple(given), self.spec)

    def to(self, device: torch.device | str) -> Self:
        """Move the backbone to a device; returns itself."""
        self.inner.to(device)
        self.device = self.inner.device
        return self

    @property
    def call_size(self) -> int | None:
        """See `Backbone.call_size`."""
        return self.inner.call_size

    def reading(self, taps: Sequence[str]) -> Self:
        """See `Backbone.reading`."""
        other = type(self)(self.inner.reading(taps), self.by)
        other._dtype = self._dtype
        return other

    def giving(self, dtype: torch.dtype) -> Self:
        """See `Backbone.giving`: of the means, which are of what the backbone gives by itself."""
        other = copy.copy(self)
        other._dtype = dtype
        return other

    def stages(self) -> Stages:
        """See `Backbone.stages`.

        Raises:
            BackboneError: always: its blocks have more tokens than its taps.
        """
        raise BackboneError(
            f"the tokens of {self.identity.architecture} are pooled by {self.by}, and its blocks need all of "
            "them. Type: --set backbone.pooled=null"
        )


def pooled(tokens: Tensor, tap: Tap, by: int) -> Tensor:
    """Means of k x k patch tokens of each frame, in float32 and rounded once: (B, N, D) -> (B, N', D).

    Args:
        tokens: of a tap; prefix tokens stay.
        tap: its grid and prefix.
        by: k.
    """
    if tap.kind == "image":
        return tokens
    time, height, width = tap.grid
    cells = (time, height // by, by, width // by, by)
    patches = tap.patch_tokens(tokens).unflatten(1, cells).mean((3, 5), dtype=torch.float32)
    units = tap.num_units
    means = patches.to(tokens.dtype).flatten(1, 3).unflatten(1, (units, -1))
    prefix = tokens.unflatten(1, (units, -1))[:, :, : tap.num_prefix]
    return torch.cat([prefix, means], 2).flatten(1, 2)


def checked(by: object) -> int:
    """A k.

    Raises:
        BackboneError: it is not.
    """
    if not isinstance(by, int) or isinstance(by, bool) or by < 2:
        raise BackboneError(f"backbone.pooled is {by!r}, expected 2 or more. Type: --set backbone.pooled=2")
    return by


def _smaller(tap: Tap, by: int, patch: object) -> Tap:
    time, height, width = tap.grid
    if tap.kind == "image":
        return tap
    if height % by or width % by:
        raise BackboneError(
            f"backbone.pooled is {by} and the grid of {tap.name} {height} x {width}, expected a divisor. "
            f"Type: {_remedy(height, width, by, patch)}"
        )
    return replace(tap, grid=(time, height // by, width // by))


def _remedy(height: int, width: int, by: int, patch: object) -> str:
    """A size whose grid it divides, of a model whose size may be chosen; else a divisor."""
    if isinstance(patch, int) and height == width and height >= by:
        return f"--size {height // by * by * patch}"
    known = [k for k in range(2, min(height, width)) if height % k == width % k == 0]
    return f"--set backbone.pooled={known[0] if known else 'null'}"

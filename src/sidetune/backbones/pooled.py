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
        if by < 2:
            raise BackboneError(f"backbone.pooled is {by}, expected 2 or more. Type: --set backbone.pooled=2")
        self.inner, self.by = inner, by
        self.spec = Spec(tuple(_smaller(tap, by) for tap in inner.spec.taps))
        arguments = {**inner.identity.arguments, "pooled": by}
        self.identity = replace(inner.identity, arguments=arguments)
        self.preprocess, self.variant, self.norm = inner.preprocess, inner.variant, inner.norm
        self.device, self.frames = inner.device, inner.frames

    def __call__(self, images: Tensor) -> Features:
        """See `Backbone.__call__`."""
        read = self.inner(images)
        pairs = zip(read.layers, read.spec.taps, strict=True)
        return Features(tuple(pooled(layer, tap, self.by) for layer, tap in pairs), self.spec)

    def to(self, device: torch.device | str) -> Self:
        """Move the backbone to a device; returns itself."""
        self.inner.to(device)
        self.device = self.inner.device
        return self

    @property
    def fewest(self) -> int:
        """See `Backbone.fewest`."""
        return self.inner.fewest

    def reading(self, taps: Sequence[str]) -> Self:
        """See `Backbone.reading`."""
        return type(self)(self.inner.reading(taps), self.by)

    def giving(self, dtype: torch.dtype) -> Self:
        """See `Backbone.giving`."""
        other = copy.copy(self)
        other.inner = self.inner.giving(dtype)
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


def _smaller(tap: Tap, by: int) -> Tap:
    time, height, width = tap.grid
    if tap.kind == "image":
        return tap
    if height % by or width % by:
        known = [k for k in range(2, max(height, width) + 1) if height % k == width % k == 0]
        remedy = f"--set backbone.pooled={known[0]}" if known else "--size with another one"
        raise BackboneError(
            f"backbone.pooled is {by} and the grid of {tap.name} {height} x {width}, expected a divisor. "
            f"Type: {remedy}"
        )
    return replace(tap, grid=(time, height // by, width // by))

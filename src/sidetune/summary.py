"""Pooled taps of many samples: all that closed forms, probes and the tap scale need.

A summary is a few kilobytes a sample where features are megabytes. Extraction writes it beside
each shard, so ridge and the linear probe answer in seconds without reading the features again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidetune.features import Features, Spec
from sidetune.sides.base import Pool, pool_tokens


@dataclass(frozen=True)
class Summary:
    """One row a sample, one column a tap.

    Args:
        spec: the taps.
        mean: a tuple of (n, D_l) float32: mean of the patch tokens of each tap.
        cls: a tuple of (n, D_l) float32: class token of each tap; (n, 0) where a tap has none.
        mean_square: (n, taps) float32: mean of the squared features over tokens and channels.
    """

    spec: Spec
    mean: tuple[Tensor, ...]
    cls: tuple[Tensor, ...]
    mean_square: Tensor

    def __len__(self) -> int:
        return self.mean_square.shape[0]

    def rows(self, rows: Tensor) -> Summary:
        """Only these samples."""
        mean = tuple(tensor[rows] for tensor in self.mean)
        cls = tuple(tensor[rows] for tensor in self.cls)
        return Summary(self.spec, mean, cls, self.mean_square[rows])

    def select(self, spec: Spec) -> Summary:
        """Only the taps of `spec`."""
        at = [self.spec.index(name) for name in spec.names]
        mean, cls = tuple(self.mean[i] for i in at), tuple(self.cls[i] for i in at)
        return Summary(spec, mean, cls, self.mean_square[:, at])

    def pooled(self, name: str, pool: Pool) -> Tensor:
        """A tap pooled by ``mean``, ``cls`` or ``cls+mean``: (n, D) or (n, 2D) float32.

        Where a tap has no class token, ``cls+mean`` is the mean alone.
        """
        position = self.spec.index(name)
        if pool == "mean":
            return self.mean[position]
        assert pool in ("cls", "cls+mean"), pool
        if pool == "cls":
            return self.cls[position]
        return torch.cat([self.cls[position], self.mean[position]], -1)

    def tap_scale(self) -> Tensor:
        """rms(b_L) / rms(b_l) a tap: (taps,) float32. Taps differ by up to 50 times in scale."""
        rms = self.mean_square.double().mean(0).sqrt()
        return (rms[-1] / rms.clamp(min=1e-12)).float()


def summarise(features: Features) -> Summary:
    """Pool every tap of a batch, in float32 (float64 features stay so)."""
    mean, cls, mean_square = [], [], []
    for layer, tap in zip(features.layers, features.spec.taps, strict=True):
        tokens = layer if layer.dtype == torch.float64 else layer.float()
        mean.append(pool_tokens(tokens, tap, "mean", features.mask))
        cls.append(tokens.new_zeros(len(tokens), 0) if tap.cls_index is None else tap.cls_token(tokens))
        mean_square.append(
            pool_tokens(tokens.square().mean(-1, keepdim=True), tap, "all", features.mask)[:, 0]
        )
    return Summary(features.spec, tuple(mean), tuple(cls), torch.stack(mean_square, -1))


def concatenate(parts: Sequence[Summary]) -> Summary:
    """Summaries of several batches as one."""
    spec = parts[0].spec
    return Summary(
        spec,
        tuple(torch.cat([part.mean[i] for part in parts]) for i in range(len(spec))),
        tuple(torch.cat([part.cls[i] for part in parts]) for i in range(len(spec))),
        torch.cat([part.mean_square for part in parts]),
    )

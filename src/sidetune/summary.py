"""Pooled taps of many samples: all that closed forms, probes and the tap scale need.

A summary is a few kilobytes a sample where features are megabytes. Extraction writes it beside
each shard, so ridge and the linear probe answer in seconds without reading the features again. More
statistics of the tokens are computed from features when they are asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sidetune.features import Features, Spec, Tap
from sidetune.sides.base import Pool, pool_tokens

Statistic = Literal["std", "quadrants"]


@dataclass(frozen=True)
class Summary:
    """One row a sample, one column a tap.

    Args:
        spec: the taps.
        mean: a tuple of (n, D_l) float32: mean of the patch tokens of each tap.
        cls: a tuple of (n, D_l) float32: class token of each tap; (n, 0) where a tap has none.
        mean_square: (n, taps) float32: mean of the squared features over tokens and channels.
        more: a tuple a statistic that was asked for: ``std`` (n, D_l), of the patch tokens;
            ``quadrants`` (n, 4 D_l), their means over a 2 x 2 grid.
    """

    spec: Spec
    mean: tuple[Tensor, ...]
    cls: tuple[Tensor, ...]
    mean_square: Tensor
    more: Mapping[Statistic, tuple[Tensor, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.mean_square.shape[0]

    def rows(self, rows: Tensor) -> Summary:
        """Only these samples."""
        return self._map(lambda column: column[rows])

    def select(self, spec: Spec) -> Summary:
        """Only the taps of `spec`."""
        at = [self.spec.index(name) for name in spec.names]
        mean, cls = tuple(self.mean[i] for i in at), tuple(self.cls[i] for i in at)
        more = {name: tuple(of_taps[i] for i in at) for name, of_taps in self.more.items()}
        return Summary(spec, mean, cls, self.mean_square[:, at], more)

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

    def _map(self, change: Callable[[Tensor], Tensor]) -> Summary:
        more = {name: tuple(map(change, of_taps)) for name, of_taps in self.more.items()}
        mean, cls = tuple(map(change, self.mean)), tuple(map(change, self.cls))
        return Summary(self.spec, mean, cls, change(self.mean_square), more)

    def _columns(self) -> Iterator[Tensor]:
        yield from (*self.mean, *self.cls, self.mean_square)
        yield from itertools.chain(*self.more.values())


def summarise(features: Features, statistics: Sequence[Statistic] = ()) -> Summary:
    """Pool every tap of a batch, in float32 (float64 features stay so).

    Args:
        features: of the batch.
        statistics: that go into `Summary.more`.
    """
    mean, cls, mean_square = [], [], []
    more: dict[Statistic, list[Tensor]] = {name: [] for name in statistics}
    for layer, tap in zip(features.layers, features.spec.taps, strict=True):
        tokens = layer if layer.dtype == torch.float64 else layer.float()
        mean.append(pool_tokens(tokens, tap, "mean", features.mask))
        # a copy: a view would keep the batch's features as long as its summary lives
        cls.append(
            tokens.new_zeros(len(tokens), 0) if tap.cls_index is None else tap.cls_token(tokens).clone()
        )
        mean_square.append(
            pool_tokens(tokens.square().mean(-1, keepdim=True), tap, "all", features.mask)[:, 0]
        )
        for name, found in more.items():
            found.append(_STATISTICS[name](tokens, tap, features.mask))
    return Summary(
        features.spec,
        tuple(mean),
        tuple(cls),
        torch.stack(mean_square, -1),
        {name: tuple(found) for name, found in more.items()},
    )


def over_time(frames: Iterable[Summary], spec: Spec) -> Summary:
    """The summary of clips, of those of their frames: every mean is over as many tokens.

    Args:
        frames: of the first frame of every clip, of the second, and so on, one or more; without more
            statistics. Two are in memory at a time.
        spec: of the clips.
    """
    every = iter(frames)
    first = next(every)
    sums = [tensor.clone() for tensor in (*first.mean, *first.cls, first.mean_square)]
    del first
    taps, count = len(spec.taps), 1
    for one in every:
        count += 1
        for total, tensor in zip(sums, (*one.mean, *one.cls, one.mean_square), strict=True):
            total.add_(tensor)
    *means, mean_square = (total.div_(count) for total in sums)
    return Summary(spec, tuple(means[:taps]), tuple(means[taps:]), mean_square)


def _std(tokens: Tensor, tap: Tap, mask: Tensor | None) -> Tensor:
    """Of the patch tokens, a channel at a time: (B, D)."""
    centred = tokens - pool_tokens(tokens, tap, "mean", mask)[:, None]
    return pool_tokens(centred.square(), tap, "mean", mask).sqrt()


def _quadrants(tokens: Tensor, tap: Tap, mask: Tensor | None) -> Tensor:
    """Means of the patch tokens over a 2 x 2 grid: (B, 4 D), row by row. Odd sides share their middle."""
    patches = tap.patch_tokens(tokens)
    counts = torch.ones_like(patches[..., :1])
    if mask is not None:
        counts = counts * tap.patch_tokens(mask[..., None])

    def pooled(values_BPD: Tensor) -> Tensor:
        over_time = values_BPD.unflatten(1, tap.grid).mean(1).movedim(-1, 1)  # (B, D, H, W)
        return F.adaptive_avg_pool2d(over_time, 2).flatten(2).mT  # (B, 4, D)

    means: Tensor = pooled(patches * counts) / pooled(counts).clamp(min=1e-12)
    return means.flatten(1)


_STATISTICS = {"std": _std, "quadrants": _quadrants}


def gathered(parts: Iterable[Summary], rows: int) -> Summary:
    """Summaries of batches as one of all their rows, in order.

    Each part is copied to its place and let go. Kept until the last, a batch's few kilobytes would lie in the
    heap between buffers of megabytes, which could then neither be joined nor given back.

    Args:
        parts: one or more, of the same taps and statistics.
        rows: of all parts together.
    """
    whole: Summary | None = None
    first = 0
    for part in parts:
        if whole is None:
            whole = part._map(lambda column: column.new_empty(rows, *column.shape[1:]))
        for place, column in zip(whole._columns(), part._columns(), strict=True):
            place[first : first + len(part)] = column
        first += len(part)
    assert whole is not None and first == rows, f"{first} of {rows} rows"
    return whole

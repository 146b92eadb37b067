"""Batches ahead of their use, in an order that memory can follow.

`Ahead` prepares batches on a thread of its own, two ahead at most: three are alive at once, where the one
in use is let go before the next is asked for.

`EpochOrder` shuffles. A store that fits into half of the memory is shuffled as a whole: every order of its
samples is as likely. A larger one does not stay in the page cache: each epoch would read it from the disk
again, in small pieces here and there. So shards are drawn in random order and cut into windows of as
many as fit into a quarter of the memory; the samples of a window are shuffled as a whole. While a window
is trained on, the next is read, front to back: two are in memory. Each epoch draws other windows, and
`extract` puts samples into shards by hash, so that each window is a random part of the data. An
epoch's first window is asked for all at once, as nothing came before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from sidetune.features import Features
from sidetune.keyed import generator
from sidetune.threads import single_threads

AHEAD = 2  # batches
Job = TypeVar("Job")
Item = TypeVar("Item")


class Ahead(Generic[Job, Item]):
    """Items made on a thread of their own, in order, a few ahead of their use. A context manager.

    What a job raises is raised where its item would have come, as it is. Leaving the context drops the jobs
    that have not begun and waits for the one that has.

    Args:
        jobs: drawn from on the thread that takes the items.
        make: makes an item of a job, in the jobs' order, one at a time, with one torch thread.
        ahead: items at most that are made or being made while one is in use; 0: no thread, each item is
            made when it is asked for.
    """

    def __init__(self, jobs: Iterable[Job], make: Callable[[Job], Item], *, ahead: int = AHEAD) -> None:
        self._jobs, self._make, self._ahead = iter(jobs), make, ahead
        self._pending: deque[Future[Item]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._ahead:
            self._thread = single_threads(1, "sidetune-reader")  # training keeps the others
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._thread is None:
            return self._make(next(self._jobs))
        self._begin(self._thread)
        if not self._pending:
            raise StopIteration
        item = self._pending.popleft().result()
        self._begin(self._thread)
        return item

    def _begin(self, thread: ThreadPoolExecutor) -> None:
        for job in islice(self._jobs, self._ahead - len(self._pending)):
            self._pending.append(thread.submit(self._make, job))


def pinned(features: Features) -> Features:
    """The same in page-locked memory, which a GPU reads by itself."""
    mask = None if features.mask is None else features.mask.pin_memory()
    return Features(tuple(layer.pin_memory() for layer in features.layers), features.spec, mask)


def sent(features: Features, device: torch.device) -> Features:
    """The same on a device. From pinned memory nothing waits for the copy but what computes with it.

    torch's allocator keeps pinned memory until the copies from it are done. Copies to the CPU are waited
    for: nothing that computes there would know of them.
    """
    waits = device.type == "cpu"
    layers = tuple(layer.to(device, non_blocking=not waits) for layer in features.layers)
    mask = None if features.mask is None else features.mask.to(device, non_blocking=not waits)
    return Features(layers, features.spec, mask)


@dataclass(frozen=True)
class Layout:
    """Where rows are read, as far as their order depends on it.

    Args:
        shards: (n,) shard number of each row.
        num_bytes: shard number -> bytes that are read of it.
        fetch: asks for shards that are needed soon.
        by_hash: samples stand in their shards by hash, so that a few shards are a random part of all.
    """

    shards: NDArray[np.int64]
    num_bytes: dict[int, int]
    fetch: Callable[[Sequence[int]], None]
    by_hash: bool = True

    def window(self, memory: int) -> int | None:
        """Shards to shuffle together: all (None) where they fit into half of the memory, else a quarter's.

        Args:
            memory: bytes of the machine, used or not: the order must not hang on what else runs.
        """
        if sum(self.num_bytes.values()) <= memory // 2:
            return None
        return max(1, memory // 4 // max(self.num_bytes.values()))


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch.

    Args:
        rows: (n,) in the order in which they are trained on.
        shards: in the order in which they are needed; none where all fit into memory.
        window: how many of them are shuffled together.
    """

    rows: NDArray[np.int64]
    shards: tuple[int, ...] = ()
    window: int = 0

    @classmethod
    def draw(
        cls, rows: NDArray[np.int64], shards: NDArray[np.int64], window: int | None, *, seed: int, epoch: int
    ) -> Self:
        """Keyed by (seed, epoch).

        Args:
            rows: (n,) to put in order.
            shards: (n,) shard number of each.
            window: shards that are shuffled together; None: all.
            seed: of the run.
            epoch: from 0.
        """
        numbers = np.unique(shards)
        if window is None or window >= len(numbers):
            return cls(rows[_permutation(len(rows), generator(seed, "order", epoch))])
        numbers = numbers[_permutation(len(numbers), generator(seed, "order/shards", epoch))]
        parts = []
        for step, first in enumerate(range(0, len(numbers), window)):
            inside = rows[np.isin(shards, numbers[first : first + window])]
            parts.append(inside[_permutation(len(inside), generator(seed, "order/window", epoch, step))])
        return cls(np.concatenate(parts), tuple(numbers.tolist()), window)

    def soon(self, first: int, last: int, *, begins: bool) -> tuple[int, ...]:
        """Shards to ask for before rows `first` to `last` are read: they are needed a window later.

        The next window is asked for in equal parts while the current one is used.

        Args:
            first: position in `rows`.
            last: the first position after them.
            begins: nothing was asked for before in this epoch.
        """
        if not self.shards:
            return ()
        until = last * len(self.shards) // len(self.rows) + self.window
        now = first * len(self.shards) // len(self.rows)
        return self.shards[now // self.window * self.window if begins else now + self.window : until]


def _permutation(count: int, keyed: torch.Generator) -> NDArray[np.int64]:
    order: NDArray[np.int64] = torch.randperm(count, generator=keyed).numpy()
    return order

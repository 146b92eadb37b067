"""A batch worked on a few samples at a time: each chunk stays in a core's cache, the chunks run on threads.

A side network's products are small. Spread over threads one by one they wait for each other; a chunk of
samples that goes through all layers on one thread waits for nobody, and its taps are read from memory
once. What chunks return is summed in their order, so a result depends on the number of threads and on
nothing else that happens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from sidetune.threads import single_threads, torch_threads

Piece = TypeVar("Piece")
Result = TypeVar("Result")

CACHE_BYTES = 28 * 2**20  # of one chunk's scratch
LEAST_BYTES = 4 * 2**20  # a chunk of less costs more in Python than another thread brings
CHUNKS_A_THREAD = 2  # at least, so that a thread that is held up leaves work to the others,
SPARE_BYTES = 8 * 2**20  # if no chunk becomes smaller: with less, Python's calls take a fifth of a step


_given: int | None = None  # threads that `threads_to_chunks` took from torch's operations


@contextmanager
def threads_to_chunks(*, when: bool = True) -> Iterator[None]:
    """Inside, torch's operations here have one thread, and chunks have all that torch had.

    A thread of torch's that has done its part of an operation spins for milliseconds on a core that a chunk
    could use. Measured on two cores: a tenth of a step of LoSA's.

    Args:
        when: False changes nothing.
    """
    global _given  # noqa: PLW0603 - torch's own number is one for all, too
    if not when or _given is not None:
        yield
        return
    _given = torch.get_num_threads()
    try:
        with torch_threads(1):
            yield
    finally:
        _given = None


def over_chunks(
    work: Callable[[slice], Result], batch: int, sample_bytes: int, device: torch.device
) -> list[Result]:
    """Do work on consecutive chunks of a batch, outside autograd and autocast: results in their order.

    Args:
        work: called with the rows of a chunk, from any thread.
        batch: B.
        sample_bytes: scratch that one sample takes.
        device: where the work is done; on a GPU the batch is one chunk.
    """
    return list(on_threads(work, over_rows(batch, sample_bytes, device), device))


def over_rows(batch: int, sample_bytes: int, device: torch.device, scale: int = 1) -> list[slice]:
    """The rows of the chunks of a batch, ``scale`` times as large as usual. Args as for `over_chunks`."""
    if device.type != "cpu":
        return [slice(0, batch)]
    return split(batch, sample_bytes, _threads(device), scale)


def on_threads(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], device: torch.device
) -> Iterator[Result]:
    """Do pieces of work outside autograd and autocast: results in their order, each as soon as it is there.

    Args:
        work: called with a piece, from any thread.
        pieces: of the work.
        device: where it is done.
    """
    threads, inference = _threads(device), torch.is_inference_mode_enabled()  # a thread does not inherit it

    def quietly(piece: Piece) -> Result:
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast(device.type, enabled=False):
            return work(piece)

    if threads == 1 or len(pieces) == 1:
        return map(quietly, pieces)
    return _pool(threads).map(quietly, pieces)


def _threads(device: torch.device) -> int:
    return (_given or torch.get_num_threads()) if device.type == "cpu" else 1


class Scratch:
    """Memory that is used again and again: fresh pages cost a tenth of a step of many members."""

    def __init__(self) -> None:
        self._taken: dict[tuple[str, torch.dtype, torch.device, bool], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor that holds anything, in the memory that the last of this name had.

        Args:
            name: of what stands there.
            shape: of the tensor.
            like: has its type and device.
        """
        numel = math.prod(shape)
        # what is made under inference_mode cannot be written outside
        key = (name, like.dtype, like.device, torch.is_inference_mode_enabled())
        if key not in self._taken or self._taken[key].numel() < numel:
            self._taken[key] = like.new_empty(numel)
        return self._taken[key][:numel].view(shape)


class Scratches:
    """Scratch of a side, as many as are in use at a time. It goes when the side goes."""

    def __init__(self) -> None:
        self._free: list[Scratch] = []

    def take(self) -> Scratch:
        """One that nobody uses."""
        try:
            return self._free.pop()
        except IndexError:
            return Scratch()

    def give_back(self, scratch: Scratch) -> None:
        """Let others use it."""
        self._free.append(scratch)

    def __deepcopy__(self, memo: object) -> Scratches:
        """A copy of a side has scratch of its own."""
        return Scratches()


def split(batch: int, sample_bytes: int, threads: int, scale: int = 1) -> list[slice]:
    """Slices of a batch, of equal length but for one sample, as many for each thread."""
    total = batch * sample_bytes
    count, fitting = min(threads, total // LEAST_BYTES), -(-total // (scale * CACHE_BYTES))
    if threads > 1 and total >= CHUNKS_A_THREAD * threads * scale * SPARE_BYTES:
        count = CHUNKS_A_THREAD * threads
    if fitting > max(count, 1):
        count = -(-fitting // threads) * threads
    count = max(1, min(batch, count))
    bounds = [batch * i // count for i in range(count + 1)]
    return [slice(first, end) for first, end in pairwise(bounds)]


def of_rows(tensor: Tensor, axis: int, rows: slice) -> Tensor:
    """What meets these samples of a tensor: the whole where its axis has one entry for all of them."""
    return tensor if tensor.shape[axis] == 1 else tensor.narrow(axis, rows.start, rows.stop - rows.start)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that are started once. Where their number changes, the old ones end with what they have."""
    return single_threads(threads, "sidetune-side")


# a forked process has the pool and none of its threads: what is given to it would wait for ever
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)

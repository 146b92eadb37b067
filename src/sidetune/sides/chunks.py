"""A batch worked on a few samples at a time: each chunk stays in a core's cache, the chunks run on threads.

A side network's products are small. Spread over threads one by one they wait for each other; a chunk of
samples that goes through all layers on one thread waits for nobody, and its taps are read from memory
once. What chunks return is summed in their order, so a result depends on the number of threads and on
nothing else that happens.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from threading import Barrier
from typing import TypeVar

import torch

Result = TypeVar("Result")

CACHE_BYTES = 28 * 2**20  # of one chunk's scratch
LEAST_BYTES = 2**20  # a chunk of less costs more in Python than another thread brings
CHUNKS_A_THREAD = 3  # at least, so that a thread that is held up leaves work to the others


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
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    chunks = split(batch, sample_bytes, threads) if device.type == "cpu" else [slice(0, batch)]

    def quietly(rows: slice) -> Result:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return work(rows)

    if threads == 1 or len(chunks) == 1:
        return [quietly(rows) for rows in chunks]
    return list(_pool(threads).map(quietly, chunks))


def split(batch: int, sample_bytes: int, threads: int) -> list[slice]:
    """Slices of a batch, of equal length but for one sample, as many for each thread."""
    wanted = CHUNKS_A_THREAD * threads if threads > 1 else 1
    worthwhile = batch * sample_bytes // LEAST_BYTES
    count = max(min(wanted, worthwhile), -(-batch * sample_bytes // CACHE_BYTES), 1)
    count = min(batch, -(-count // threads) * threads) if count > 1 else 1
    bounds = [batch * i // count for i in range(count + 1)]
    return [slice(first, end) for first, end in pairwise(bounds)]


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads whose own operations use one thread each."""
    barrier = Barrier(threads)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a new thread settles its number at the first question: ask now
        barrier.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="side", initializer=start)
    list(pool.map(lambda _: None, range(threads)))
    torch.set_num_threads(threads)  # the number for threads to come is one for all: put it back
    return pool

"""How many threads torch's operations have: here, and on threads of our own.

Many small products run best on one thread: threads that wait for each other cost more than they bring.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import torch
from threadpoolctl import threadpool_limits

TINY = torch.tensor([700_000], dtype=torch.int32).view(torch.float32)  # 9.8e-40, whatever this thread does
SMALL = 2048  # the smaller side of a matrix whose decomposition is quick on one thread


@contextmanager
def one_thread(*, when: bool = True) -> Iterator[None]:
    """One thread in torch and in every BLAS inside; as it was afterwards.

    Measured on two cores that others use too: the linear probe of 1,000 images took 169 s on two
    threads and 3 s on one.

    Args:
        when: False leaves the threads as they are.
    """
    if not when:
        yield
        return
    with torch_threads(1), threadpool_limits(limits=1):  # SciPy and numpy bring a BLAS of their own
        yield


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many threads in torch inside, as it was afterwards; None leaves them as they are."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def tiny_to_zero() -> Iterator[None]:
    """Inside, on this thread of the CPU, float32 numbers below 1.2e-38 count as zero; as it was afterwards.

    GELU leaves such numbers where its argument is below -13, and a processor takes a hundred times as long
    over each: on photographs a step of LoSA's took 1.2 times as long, one of the bypass 2.6 times.
    """
    before = not (TINY * 1).item()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def single_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads, all started, that give torch's operations one thread each, and whose tiny numbers are zero.

    torch takes the number that a thread sets for that thread and for all that begin later; a thread keeps
    the one that it first asked for. So each sets its own, asks, and the caller's is put back once all
    have asked: what begins later has the caller's.

    Args:
        count: of threads.
        name: that theirs begin with.
    """
    started = Barrier(count)

    def settle() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()
        torch.set_flush_denormal(True)
        started.wait()  # one that waits is not idle: the next job starts another

    pool = ThreadPoolExecutor(count, name, initializer=settle)
    with torch_threads(None):
        try:
            list(pool.map(int, [0] * count))
        except BaseException:  # Ctrl-C, or no more threads: those that wait for the others must not wait
            started.abort()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return pool

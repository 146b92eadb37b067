"""Many small products on one thread: threads that wait for each other cost more than they bring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits

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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):  # SciPy and numpy bring a BLAS of their own
            yield
    finally:
        torch.set_num_threads(threads)

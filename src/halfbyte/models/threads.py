"""Threads that work on a tensor each, and end with the block that they were started for."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

MAX_THREADS = 16


@contextmanager
def threads(
    count: int, initializer: Callable[[], None] | None = None
) -> Iterator[ThreadPoolExecutor]:
    """Threads that are gone at the end; after an exception, what they had not begun is dropped."""
    executor = ThreadPoolExecutor(count, initializer=initializer)
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def single_core_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch may use, in each of which torch uses one.

    Tensors in parallel need no barriers, which cost more than the work when the machine is busy,
    and every sum is taken in the same order whatever the number of cores.
    """
    allowed = torch.get_num_threads()
    count = min(allowed, MAX_THREADS)
    started = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        started.wait()

    with threads(count, begin) as executor:
        for _ in range(count):
            executor.submit(os.getpid)  # a task for each starts each
        started.wait()
        torch.set_num_threads(allowed)  # for threads yet to come; those above keep one
        yield executor

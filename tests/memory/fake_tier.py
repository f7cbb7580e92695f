"""A slow tier in memory that can be slow, full or broken."""

import errno
import random
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.errors import StorageError


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for another thread, at most ten seconds."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.0005)


class FakeTier:
    """Checks what the pool promises a tier, and fails on demand."""

    def __init__(self, *, delay: float = 0.0, seed: int = 0) -> None:
        self.pages: dict[int, Tensor] = {}
        self.reserved = 0
        self.free = 2**40
        self.capacity: int | None = None  # bytes; None for no limit
        self.broken_writes = False
        self.broken_reads = False
        self.failures_left = 0  # transfers that fail before one succeeds
        self.reads = self.writes = 0
        self.closed = False
        self._delay = delay
        self._random = random.Random(seed)  # noqa: S311
        self._busy: set[int] = set()
        self._lock = threading.Lock()

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 0xA5, dtype=torch.uint8)  # never to be mistaken for zeros

    def free_bytes(self) -> int:
        return self.free

    def fence(self) -> object:
        return None

    def reserve(self, num_bytes: int) -> None:
        if self.capacity is not None and num_bytes > self.capacity:
            raise StorageError(f"cannot reserve {num_bytes} bytes")
        self.reserved = max(self.reserved, num_bytes)

    def read(self, position: int, into: Tensor, fence: object) -> None:
        with self._lock:
            self.reads += 1
            assert position not in self._busy
        self._work(broken=self.broken_reads)
        into.copy_(self.pages[position])

    def write(self, position: int, data: Tensor, fence: object) -> None:
        with self._lock:
            self.writes += 1
            assert position + data.numel() <= self.reserved, "written before it was reserved"
            assert position not in self._busy, "two writes of one page at a time"
            self._busy.add(position)
        try:
            self._work(broken=self.broken_writes)
            self.pages[position] = data.clone()
        finally:
            with self._lock:
                self._busy.remove(position)

    def _work(self, *, broken: bool) -> None:
        if self._delay:
            time.sleep(self._random.random() * self._delay)
        with self._lock:
            if self.failures_left:
                self.failures_left -= 1
                broken = True
        if broken:
            raise OSError(errno.EIO, "Input/output error")

    def describe(self) -> str:
        return "fake tier"

    def cached_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        self.closed = True

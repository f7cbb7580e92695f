"""The tiers of a GPU, with a made-up device that does its work as late as it may."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from halfbyte.errors import StorageError
from halfbyte.memory.device import PinnedHostTier
from halfbyte.memory.layout import Field, Item
from halfbyte.memory.pool import Pool

PAGE = 4096


class LateDevice:
    """Kernels run only when something waits for them."""

    def __init__(self, host_limit: int = 2**30) -> None:
        self.queue: list[Callable[[], object]] = []
        self.done = 0
        self.pinned = 0
        self.host_limit = host_limit
        self.waits = 0
        self._lock = threading.Lock()

    def launch(self, kernel: Callable[[], object]) -> None:
        self.queue.append(kernel)

    def run_until(self, event: object) -> None:
        with self._lock:
            target = event if isinstance(event, int) else 0
            while self.done < target:
                self.queue[self.done]()
                self.done += 1

    def device_memory(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 0x5A, dtype=torch.uint8)

    def free_bytes(self) -> int:
        return 123

    def host_memory(self, num_bytes: int) -> Tensor:
        if self.pinned + num_bytes > self.host_limit:
            raise RuntimeError("out of pinned memory")
        self.pinned += num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8)

    def event(self) -> object:
        return len(self.queue)

    def copy(self, into: Tensor, source: Tensor, after: object) -> None:
        self.waits += after is not None
        self.run_until(after)
        into.copy_(source)


@pytest.mark.parametrize("pages", [2, 3, 5])
def test_pages_leave_only_when_their_kernels_are_through(pages: int) -> None:
    device = LateDevice()
    pool = Pool(PinnedHostTier(device), fast_bytes=pages * PAGE, page_bytes=PAGE)
    pool.add([Item("x", 3 * PAGE, (Field("a", torch.float32),))])
    pool.add([Item("y", PAGE, (Field("a", torch.float32),))])  # a second block of host memory
    for step in range(5):
        for chunk in pool.walk():
            device.launch(lambda value=chunk.values[0], step=step: value.mul_(3).add_(step))
    device.run_until(len(device.queue))
    expected = torch.tensor(0.0)
    for step in range(5):
        expected.mul_(3).add_(step)
    for item in (0, 1):
        assert pool.read(item)[0].eq(expected).all()
    assert device.waits > 0
    assert device.pinned == 16 * PAGE
    assert pool.make_room(0, most=10 * PAGE) == pages * PAGE + 123
    assert pool.stats().slow_tier == "pinned host memory"
    pool.close()


def test_a_host_without_memory_to_pin_is_a_storage_error() -> None:
    pool = Pool(PinnedHostTier(LateDevice(host_limit=PAGE)), fast_bytes=2 * PAGE, page_bytes=PAGE)
    with pytest.raises(StorageError, match="cannot pin"):
        pool.add([Item("x", 4 * PAGE, (Field("a", torch.float32),))])
    assert not pool.items

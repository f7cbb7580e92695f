"""Device memory in front of pinned host memory: the tiers of a GPU.

**This has never run on a GPU.** The pool, the order of copies and the fences are tested on a CPU
with a made-up device whose work is late; `CudaStreams` itself, a few lines, is not.

Kernels and copies are queued on streams, so the host is ahead of the device. A page may leave only
when the kernels that change it are through: the fence is an event on the stream
of the kernels, and the copy waits for it. A page has come only when its copy is through: the
transfer thread waits for that, so the kernels the owner queues afterwards find it there.
"""

from typing import Protocol

import torch
from torch import Tensor

from halfbyte.errors import StorageError


class Streams(Protocol):
    """What the tier needs of a device."""

    def device_memory(self, num_bytes: int) -> Tensor:
        """Uint8 `[num_bytes]` on the device."""
        ...

    def free_bytes(self) -> int:
        """Device memory that is not in use."""
        ...

    def host_memory(self, num_bytes: int) -> Tensor:
        """Uint8 `[num_bytes]` on the host, pinned so that the device can copy by itself."""
        ...

    def event(self) -> object:
        """Mark the work queued so far on the caller's current stream."""
        ...

    def copy(self, into: Tensor, source: Tensor, after: object) -> None:
        """Copy once the marked work is done, and return when the copy is."""
        ...


class CudaStreams:
    """Streams of an NVIDIA or AMD GPU. Never run: see the top of this file."""

    def __init__(self, device: torch.device) -> None:
        """One stream a direction, so that reading and writing overlap."""
        self._device = device
        self._to_device = torch.cuda.Stream(device)
        self._to_host = torch.cuda.Stream(device)

    def device_memory(self, num_bytes: int) -> Tensor:
        """From PyTorch's caching allocator."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def free_bytes(self) -> int:
        """As the driver says; what PyTorch's allocator keeps for itself counts as used."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return free

    def host_memory(self, num_bytes: int) -> Tensor:
        """From PyTorch's pinned allocator."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def event(self) -> object:
        """An event on the caller's current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(self, into: Tensor, source: Tensor, after: object) -> None:
        """Copy on the stream of the direction."""
        stream = self._to_device if into.is_cuda else self._to_host
        with torch.cuda.stream(stream):
            if isinstance(after, torch.cuda.Event):
                stream.wait_event(after)
            into.copy_(source, non_blocking=True)
        stream.synchronize()


class PinnedHostTier:
    """Device memory in front of pinned host memory. Never run on a GPU."""

    def __init__(self, streams: Streams) -> None:
        """`streams` is the device's own, such as `CudaStreams(device)`."""
        self._streams = streams
        self._blocks: list[tuple[int, Tensor]] = []  # where each starts; pages lie within one
        self._reserved = 0

    def buffer(self, num_bytes: int) -> Tensor:
        """Device memory, not cleared."""
        return self._streams.device_memory(num_bytes)

    def free_bytes(self) -> int:
        """Device memory that is not in use."""
        return self._streams.free_bytes()

    def fence(self) -> object:
        """Mark the kernels queued so far."""
        return self._streams.event()

    def reserve(self, num_bytes: int) -> None:
        """Pin as much host memory.

        Raises:
            StorageError: The host has no more.
        """
        if num_bytes <= self._reserved:
            return
        try:
            block = self._streams.host_memory(num_bytes - self._reserved)
        except RuntimeError as error:
            raise StorageError(
                f"cannot pin {num_bytes - self._reserved} bytes of host memory: {error}",
                hint="Raise fast_bytes, so that less must leave the device.",
            ) from error
        self._blocks.append((self._reserved, block))
        self._reserved = num_bytes

    def read(self, position: int, into: Tensor, fence: object) -> None:
        """Copy from the host."""
        self._streams.copy(into, self._slot(position, into.numel()), fence)

    def write(self, position: int, data: Tensor, fence: object) -> None:
        """Copy to the host."""
        self._streams.copy(self._slot(position, data.numel()), data, fence)

    def describe(self) -> str:
        """What the slow tier is."""
        return "pinned host memory"

    def cached_bytes(self) -> int:
        """No file, so no cache of one."""
        return 0

    def close(self) -> None:
        """Give the host memory back."""
        self._blocks.clear()
        self._reserved = 0

    def _slot(self, position: int, num_bytes: int) -> Tensor:
        start, block = next(b for b in reversed(self._blocks) if b[0] <= position)
        return block[position - start : position - start + num_bytes]

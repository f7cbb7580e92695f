"""The two places a page can be: a fast buffer, and a slot in something slower and larger.

On a CPU the fast buffers are RAM and the slow tier is a file. The file is read and written with
`preadv` and `pwritev`, not mapped, for four reasons: a failing disk is an error code instead of a
SIGBUS; the pool, not the kernel, decides what is in memory; a transfer runs on a thread
of its own while the arithmetic goes on, where a page fault stops it; and mapped pages would
count as resident.

The file is opened with O_DIRECT where the filesystem allows it. Otherwise the kernel would keep
a copy of every page in its cache: the memory the budget is meant to free, and at the
expense of the mapped weights, which live in that cache. Where O_DIRECT is not to be had, the
cache is asked (posix_fadvise) to drop each page once it is written or read.
"""

import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.errors import StorageError, UsageError
from halfbyte.memory.available import available_memory
from halfbyte.memory.mounts import RAM_FILESYSTEMS, filesystem_of

BLOCK = 4096
"""Bytes; O_DIRECT wants file positions, lengths and addresses to be multiples of it."""


class Tier(Protocol):
    """Fast buffers, and slow storage for what does not fit.

    `reserve` is called before any page is moved, on the caller's thread; `read` and `write`
    run on other threads. Failures are `OSError`.
    """

    def buffer(self, num_bytes: int) -> Tensor:
        """A fast buffer, uint8 `[num_bytes]`."""
        ...

    def free_bytes(self) -> int:
        """Fast memory that can still be taken."""
        ...

    def fence(self) -> object:
        """Mark the work queued so far on the caller's thread; reads and writes wait for it."""
        ...

    def reserve(self, num_bytes: int) -> None:
        """Make sure that this many bytes can be written."""
        ...

    def read(self, position: int, into: Tensor, fence: object) -> None:
        """Fill a buffer from the slow tier."""
        ...

    def write(self, position: int, data: Tensor, fence: object) -> None:
        """Store a buffer in the slow tier."""
        ...

    def describe(self) -> str:
        """The slow tier in a few words."""
        ...

    def cached_bytes(self) -> int | None:
        """RAM the kernel uses to cache the slow tier; None when it cannot be told."""
        ...

    def close(self) -> None:
        """Give everything back. May be called twice."""
        ...


class FileTier:
    """RAM in front of a file without a name, which is gone when the process is.

    Raises:
        UsageError: The directory does not exist, or is itself in RAM.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        direct: bool = True,
        allocate: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Choose where the file will be; it is made when first needed.

        Args:
            directory: On a disk. By default TMPDIR, else /var/tmp.
            direct: Use O_DIRECT if the filesystem can.
            allocate: Makes the buffers, whose addresses have to be multiples of `BLOCK`.
        """
        self._allocate = allocate or anonymous
        self._directory = on_disk(directory or Path(os.environ.get("TMPDIR") or "/var/tmp"))  # noqa: S108
        self._direct = direct
        self._descriptor: int | None = None
        self._reserved = 0
        self._last_written = (0, 0)

    def buffer(self, num_bytes: int) -> Tensor:
        """Memory as `allocate` makes it; by default anonymous, gone with the last reference."""
        return self._allocate(num_bytes)

    def free_bytes(self) -> int:
        """What the machine and all limits on this process leave."""
        return available_memory().bytes

    def fence(self) -> object:
        """Nothing to wait for: arithmetic on a CPU is over when it returns."""
        return None

    def reserve(self, num_bytes: int) -> None:
        """Allocate the file's blocks, so that a full disk shows before anything is moved.

        Raises:
            StorageError: The disk or the quota is full, or the file cannot be made.
        """
        if num_bytes <= self._reserved:
            return
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            os.posix_fallocate(self._descriptor, 0, num_bytes)
        except OSError as error:
            raise StorageError(
                f"cannot reserve {num_bytes} bytes in {self._directory}: {error.strerror}",
                hint="Free that much space, or choose another directory with directory=.",
            ) from error
        self._reserved = num_bytes

    def read(self, position: int, into: Tensor, fence: object) -> None:  # noqa: ARG002
        """Fill the buffer; it is a multiple of `BLOCK` long."""
        view = into.numpy().data
        done = 0
        while done < len(view):
            count = os.preadv(self._file, [view[done:]], position + done)
            if not count:
                raise OSError(errno.EIO, "the file ends early")
            done += count
        if not self._direct:
            self._drop(position, len(view))

    def write(self, position: int, data: Tensor, fence: object) -> None:  # noqa: ARG002
        """Store the buffer; it is a multiple of `BLOCK` long."""
        view = data.numpy().data
        done = 0
        while done < len(view):
            done += os.pwritev(self._file, [view[done:]], position + done)
        if not self._direct:
            # On dirty pages the advice starts the writing; the next time it finds them clean.
            self._drop(position, len(view))
            self._drop(*self._last_written)
            self._last_written = (position, len(view))

    def describe(self) -> str:
        """Where the file is and how it is read."""
        how = "O_DIRECT" if self._direct else "through the page cache, dropped after use"
        return f"file in {self._directory}, {how}"

    def cached_bytes(self) -> int | None:
        """Bytes of the file in the kernel's page cache."""
        return 0 if self._descriptor is None else _cached_bytes(self._descriptor, self._reserved)

    def close(self) -> None:
        """Close the file, which frees its blocks."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor, self._reserved = None, 0

    @property
    def _file(self) -> int:
        assert self._descriptor is not None, "reserve comes before reading and writing"  # noqa: S101
        return self._descriptor

    def _open(self) -> int:
        with tempfile.NamedTemporaryFile(dir=self._directory, prefix="halfbyte-pages-") as file:
            flags = os.O_RDWR | os.O_CLOEXEC
            if self._direct:
                try:
                    return os.open(file.name, flags | os.O_DIRECT)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._direct = False  # this filesystem has no O_DIRECT; `describe` says so
            return os.open(file.name, flags)

    def _drop(self, position: int, length: int) -> None:
        if length:
            os.posix_fadvise(self._file, position, length, os.POSIX_FADV_DONTNEED)


def anonymous(num_bytes: int) -> Tensor:
    """Memory of its own, uint8 `[num_bytes]`, zero, at a page's start."""
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def on_disk(directory: Path) -> Path:
    """The directory, if paging to it frees memory.

    Raises:
        UsageError: It does not exist, or is in RAM.
    """
    if not directory.is_dir():
        raise UsageError(f"no directory {directory} to page to; name one with directory=")
    kind = filesystem_of(directory)
    if kind in RAM_FILESYSTEMS:
        raise UsageError(
            f"{directory} is a {kind}: files there are kept in RAM, so paging to it frees none",
            hint="Name a directory on a disk with directory=.",
        )
    return directory


def _cached_bytes(descriptor: int, length: int) -> int | None:
    """Count the file's pages in the cache, by mincore(2) over a mapping that touches none."""
    if not length:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    pages = -(-length // mmap.PAGESIZE)
    present = (ctypes.c_ubyte * pages)()
    with mmap.mmap(descriptor, length) as mapped:
        anchor = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(anchor))
        failed = libc.mincore(address, ctypes.c_size_t(length), present)
        del anchor  # it exports the buffer, which therefore could not be closed
    return None if failed else sum(flag & 1 for flag in bytes(present)) * mmap.PAGESIZE

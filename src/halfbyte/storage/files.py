"""Opening files that others wrote: regular ones only, and never waiting for one."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.errors import FormatError, MissingFileError, StorageError, UnsafeArtifactError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Open a regular file for reading; symbolic links are followed to one.

    Yields:
        The file descriptor, closed at the end, and what `fstat` says of it.

    Raises:
        MissingFileError: There is no such file.
        UnsafeArtifactError: It is a directory, FIFO, socket or device. It is not opened: opening
            a device can have effects, and opening a FIFO waits for a writer.
        StorageError: It cannot be opened: permission, a loop of links, a disk fault.
    """
    try:
        _require_regular(path, os.stat(path))  # noqa: PTH116  (Path.stat hides nothing, os is used throughout)
        # O_NONBLOCK for the case that the file was exchanged for a FIFO in between.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except UnsafeArtifactError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        _require_regular(path, status)
        yield descriptor, status
    finally:
        os.close(descriptor)


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise UnsafeArtifactError(f"{path}: a regular file expected, found {kind}")


def read_exactly(descriptor: int, size: int, offset: int, path: Path) -> bytes:
    """`size` bytes at `offset`.

    Raises:
        FormatError: The file ends before.
    """
    parts = []
    while size:
        part = os.pread(descriptor, size, offset)
        if not part:
            raise FormatError(f"{path}: ends at byte {offset}, {size} more bytes were expected")
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return b"".join(parts)


def read_into(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` from `offset` on.

    Raises:
        FormatError: The file ends before.
    """
    while buffer.nbytes:
        count = os.preadv(descriptor, [buffer], offset)
        if not count:
            raise FormatError(
                f"{path}: ends at byte {offset}, {buffer.nbytes} more bytes were expected",
                hint="Something truncated it while it was read.",
            )
        buffer = buffer[count:]
        offset += count

"""One process at a time writes into a directory."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.errors import StorageError

LOCK = ".lock"


@contextmanager
def lock_directory(path: Path | str) -> Iterator[None]:
    """Hold a directory, which must exist, for this process until the end of the context.

    The lock dies with its process, however that ends; the file `.lock` stays, holding the number
    of the process that had it last.

    Raises:
        StorageError: Another process holds it (its number is named), or it cannot be locked.
    """
    file = Path(path) / LOCK
    try:
        # Never through a link: the lock file is written to.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(file, flags, 0o666)
    except OSError as error:
        raise StorageError(f"{path} cannot be locked: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            raise StorageError(
                f"{path} is in use by process {owner or 'unknown'}",
                hint="Wait for it to end, or stop it.",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)

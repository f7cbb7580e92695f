"""Files and directories that appear whole or not at all.

Everything is written under a temporary name beside its target, synced, and renamed. A process
holds a lock on what it is writing; what a dead process left behind is therefore recognised, and
removed when the next one writes into the same parent.
"""

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from halfbyte.errors import StorageError

SUFFIX = ".halfbyte-tmp"
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}" + re.escape(SUFFIX), re.DOTALL)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def new_directory(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Make a directory that exists only once it is complete.

    Fill the directory that is yielded. At the end every file and directory in it is synced, and
    it takes its name; the parent is synced too. On any exception it is removed. With `replace`,
    the old directory stays in place until the exchange, which is one system call.

    Raises:
        StorageError: `path` exists and `replace` is False, the disk is full, or the file system
            cannot exchange two directories.
    """
    target = Path(path)
    if not replace:
        require_absent(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent)
    with _translated(target), _temporary(target, directory=True) as (temporary, _):
        yield temporary
        sync_tree(temporary)
        if _exists(target):
            _exchange(temporary, target)
            _remove(temporary)  # what was there before
        else:
            temporary.rename(target)
        sync_directory(target.parent)


def require_absent(path: Path | str) -> None:
    """Raise if there is something at `path`: what takes long asks before it begins.

    Raises:
        StorageError: It exists.
    """
    if _exists(Path(path)):
        raise StorageError(f"{path} exists already", hint="Remove it, or write elsewhere.")


@contextmanager
def new_file(path: Path | str) -> Iterator[BinaryIO]:
    """Write a file that takes its name, in place of an older one, only once it is complete.

    Yields:
        An empty file, open for writing at any position. On any exception it is removed.

    Raises:
        StorageError: The disk is full.
    """
    target = Path(path)
    with _translated(target), _temporary(target, directory=False) as (temporary, descriptor):
        with os.fdopen(os.dup(descriptor), "r+b") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        temporary.replace(target)
        sync_directory(target.parent)


def write_file(path: Path | str, content: bytes) -> None:
    """Write or replace a file as a whole, synced.

    Raises:
        StorageError: The disk is full.
    """
    with new_file(path) as file:
        file.write(content)


def check_free_space(path: Path | str, needed: int) -> None:
    """Raise unless `needed` bytes can be written below `path`, which need not exist.

    Raises:
        StorageError: There is less; the message names both numbers.
    """
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"{path}: {needed} bytes needed, {free} free on the disk of {existing}",
            hint=f"Free {needed - free} bytes, or write to another disk.",
        )


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove what dead processes were writing into `parent`; returns what was removed."""
    removed = []
    for entry in sorted(parent.iterdir()):
        if not _TEMPORARY.fullmatch(entry.name) or entry.is_symlink():
            continue
        try:
            descriptor = os.open(entry, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):  # finished since, or another user's
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(entry)
            removed.append(entry)
        except BlockingIOError:  # its writer lives
            pass
        finally:
            os.close(descriptor)
    return removed


def sync_tree(directory: Path) -> None:
    """Sync every file and directory below `directory`, and itself."""
    for folder, _, files in os.walk(directory):
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                _sync(path)
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """Sync the names in a directory."""
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _temporary(target: Path, *, directory: bool) -> Iterator[tuple[Path, int]]:
    """A locked sibling of `target`, removed at the end if it is still there."""
    temporary, descriptor = _claim(target, directory=directory)
    try:
        yield temporary, descriptor
    except BaseException:
        _remove(temporary)
        raise
    finally:
        os.close(descriptor)


def _claim(target: Path, *, directory: bool) -> tuple[Path, int]:
    while True:
        path = target.with_name(f".{target.name[:200]}.{secrets.token_hex(6)}{SUFFIX}")
        if directory:
            path.mkdir()
            flags = os.O_RDONLY
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        # Until it is locked, another process may take it for abandoned and remove it.
        with suppress(FileNotFoundError):
            descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists():
                    return path, descriptor
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        with suppress(FileNotFoundError):  # another process removes it at the same time
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _exchange(first: Path, second: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (_AT_FDCWD, bytes(first), _AT_FDCWD, bytes(second), _RENAME_EXCHANGE)
    if libc.renameat2(*arguments):
        reason = os.strerror(ctypes.get_errno())
        raise StorageError(
            f"{second}: this file system cannot replace a directory in one step: {reason}",
            hint="Write to a new path, then remove the old directory.",
        )


@contextmanager
def _translated(target: Path) -> Iterator[None]:
    """A full disk as an error that says how full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, StorageError):
            raise
        free = shutil.disk_usage(target.parent).free
        raise StorageError(
            f"{target}: the disk is full, {free} bytes are free; nothing was written",
            hint="Free space on this disk, or write to another one.",
        ) from error

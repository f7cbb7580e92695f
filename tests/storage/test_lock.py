"""A directory is locked by one process, and by no dead one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.errors import StorageError
from halfbyte.storage.lock import lock_directory

HOLDER = """
import sys, time
from halfbyte.storage.lock import lock_directory
with lock_directory(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_owner_is_named_and_a_dead_one_is_none(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(StorageError, match=f"is in use by process {holder.pid}\n"),
        lock_directory(tmp_path),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with lock_directory(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_lock_is_not_entered_twice(tmp_path: Path) -> None:
    with (
        lock_directory(tmp_path),
        pytest.raises(StorageError, match=f"process {os.getpid()}\n"),
        lock_directory(tmp_path),
    ):
        pass
    with lock_directory(tmp_path):
        pass


def test_what_cannot_be_locked(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="cannot be locked: No such file"),
        lock_directory(tmp_path / "gone"),
    ):
        pass
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(StorageError, match="cannot be locked"), lock_directory(tmp_path):
        pass
    assert victim.read_text() == "precious"

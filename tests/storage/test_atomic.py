"""Files and directories appear whole or not at all, whatever happens to their writer."""

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.errors import StorageError
from halfbyte.storage import atomic
from halfbyte.storage.atomic import (
    SUFFIX,
    check_free_space,
    new_directory,
    new_file,
    remove_abandoned,
    write_file,
)


def fill(directory: Path, text: str) -> None:
    (directory / "sub").mkdir()
    (directory / "a").write_text(text)
    (directory / "sub" / "b").write_text(text)
    (directory / "link").symlink_to("a")


def test_a_new_directory(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "model"
    with new_directory(target) as temporary:
        fill(temporary, "x")
        assert not target.exists()
        assert temporary.parent == target.parent
        assert temporary.name.startswith(".model.")
        assert temporary.name.endswith(SUFFIX)
    assert (target / "sub" / "b").read_text() == "x"
    assert list(target.parent.iterdir()) == [target]


def test_everything_is_synced_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def record_rename(path: Path, target: Path) -> None:
        events.append("rename")
        rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    with new_directory(tmp_path / "model") as temporary:
        fill(temporary, "x")
    assert sorted(events[:4]) == sorted(["a", "b", "sub", temporary.name])
    assert events[4:] == ["rename", tmp_path.name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_on_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "model") as temporary:
            fill(temporary, "x")
            raise error

    with pytest.raises(error):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_what_exists_is_not_replaced_unasked(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model"
    if kind == "file":
        target.write_text("x")
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to("nowhere")
    with pytest.raises(StorageError, match="model exists already"), new_directory(target):
        pass
    assert list(tmp_path.iterdir()) == [target]


def test_replacing_is_one_exchange(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("old", "new"):
        with new_directory(target, replace=True) as temporary:
            fill(temporary, text)
            if text == "new":
                assert (target / "a").read_text() == "old"
    assert (target / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_can_be_replaced_by_a_directory(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.write_text("old")
    with new_directory(target, replace=True) as temporary:
        fill(temporary, "new")
    assert (target / "a").read_text() == "new"


def test_a_file_system_that_cannot_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_RENAME_EXCHANGE", 1 << 30)  # flags that no kernel knows
    target = tmp_path / "model"
    target.mkdir()
    with (
        pytest.raises(StorageError, match="cannot replace a directory in one step: Invalid arg"),
        new_directory(target, replace=True),
    ):
        pass
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_file(path, b"old")
    with new_file(path) as file:
        file.write(b"ne")
        assert path.read_bytes() == b"old"
        file.write(b"w")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_that_failed_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_file(path, b"old")

    def fail() -> None:
        with new_file(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(tmp_path: Path, number: int) -> None:
    def fill_up() -> None:
        with new_directory(tmp_path / "model"):
            raise OSError(number, "full")

    with pytest.raises(StorageError, match=r"model: the disk is full, \d+ bytes are free; nothing"):
        fill_up()
    assert not list(tmp_path.iterdir())


def test_other_faults_pass_unchanged(tmp_path: Path) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "model"):
            raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        fail()


def test_free_space(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "there", 1)
    with pytest.raises(StorageError, match=rf"{2**60} bytes needed, \d+ free on the disk of"):
        check_free_space(tmp_path / "not" / "there", 2**60)


# What dead processes leave behind.


def test_only_what_the_dead_left_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / f".a.{'0' * 12}{SUFFIX}"
    dead.mkdir()
    (dead / "x").write_text("x")
    dead_file = tmp_path / f".b.{'1' * 12}{SUFFIX}"
    dead_file.write_text("x")
    kept = [tmp_path / f"mine{SUFFIX}", tmp_path / f".c{SUFFIX}"]
    for path in kept:
        path.write_text("x")
    link = tmp_path / f".d.{'2' * 12}{SUFFIX}"
    link.symlink_to(kept[0])
    alive = tmp_path / f".e.{'3' * 12}{SUFFIX}"
    alive.mkdir()
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert remove_abandoned(tmp_path) == [dead, dead_file]
    assert sorted(tmp_path.iterdir()) == sorted([*kept, link, alive])
    os.close(descriptor)


def test_a_temporary_that_vanishes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = tmp_path / f".a.{'0' * 12}{SUFFIX}"
    dead.mkdir()
    entries = list(tmp_path.iterdir())
    dead.rmdir()
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(entries))
    assert remove_abandoned(tmp_path) == []


def test_a_temporary_taken_for_abandoned_before_it_was_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may lock or remove it between its making and its locking: it is made anew."""
    flock, outcomes = fcntl.flock, ["locked by another", "removed by another", "mine"]

    def contended(descriptor: int, operation: int) -> None:
        outcome = outcomes.pop(0)
        if outcome == "locked by another":
            raise BlockingIOError
        flock(descriptor, operation)
        if outcome == "removed by another":
            Path(f"/proc/self/fd/{descriptor}").readlink().rmdir()

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", contended)
        with new_directory(tmp_path / "model") as temporary:
            fill(temporary, "x")
    assert not outcomes
    assert (tmp_path / "model" / "a").exists()


WRITER = """
import sys
from pathlib import Path
from halfbyte.storage.atomic import new_directory
for count in range(10**9):
    print(count, flush=True)
    with new_directory(sys.argv[1], replace=True) as temporary:
        for i in range(5):
            (temporary / str(i)).write_text(str(count) * 1000)
"""


def test_killing_a_writer_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    target = tmp_path / "model"
    delays = random.Random(0)  # noqa: S311  (no secret)
    for num_completed in (0, 1, 3, 0, 2, 0):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        for _ in range(num_completed + 1):
            writer.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(delays.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        if target.exists():
            contents = {(target / str(i)).read_text() for i in range(5)}
            assert len(contents) == 1  # all of one writing
            assert len(list(target.iterdir())) == 5
        with new_directory(tmp_path / "other", replace=True):
            pass
        left = {path.name for path in tmp_path.iterdir()}
        assert left <= {"model", "other"}
    assert target.exists()


@pytest.mark.skipif(not shutil.which("mount") or os.getuid() != 0, reason="needs root to mount")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk],  # noqa: S607
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(StorageError, match="the disk is full"):
            write_file(disk / "f", bytes(1 << 20))
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)  # noqa: S607

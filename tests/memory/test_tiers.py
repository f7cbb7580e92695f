"""The file tier against real files and filesystems."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte.errors import StorageError, UsageError
from halfbyte.memory.layout import Field, Item
from halfbyte.memory.mounts import filesystem_of
from halfbyte.memory.pool import Pool
from halfbyte.memory.resident import private_bytes
from halfbyte.memory.tiers import FileTier

MB = 2**20
DISK = Path("/var/tmp")  # noqa: S108  (by convention on a disk)
SHM = Path("/dev/shm")  # noqa: S108  (by convention in RAM)


@pytest.fixture
def disk() -> Path:
    """A directory on a real filesystem: pytest's own may be in RAM."""
    if filesystem_of(DISK) in {None, "tmpfs", "ramfs"}:
        pytest.skip(f"{DISK} is not on a disk")
    return DISK


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_is_read(disk: Path, direct: bool) -> None:
    tier = FileTier(disk, direct=direct)
    tier.reserve(8 * MB)
    for page in range(8):
        data = tier.buffer(MB).fill_(page + 1)
        tier.write(page * MB, data, None)
    for page in reversed(range(8)):
        into = tier.buffer(MB)
        tier.read(page * MB, into[: MB // 2], None)
        assert into[: MB // 2].eq(page + 1).all()
        assert into[MB // 2 :].eq(0).all()
    if "O_DIRECT" in tier.describe():
        assert direct
        assert tier.cached_bytes() == 0
    else:
        cached = tier.cached_bytes()
        assert cached is not None
        assert cached <= 8 * MB
    tier.close()
    tier.close()
    assert tier.cached_bytes() == 0


def test_the_page_cache_is_counted(disk: Path) -> None:
    """Without O_DIRECT, pages just read are dropped, but those of another reader stay."""
    tier = FileTier(disk, direct=False)
    tier.reserve(4 * MB)
    tier.write(0, tier.buffer(4 * MB).fill_(1), None)
    os.fsync(tier._file)
    os.pread(tier._file, 4 * MB, 0)
    assert tier.cached_bytes() == 4 * MB
    tier.read(0, tier.buffer(4 * MB), None)
    assert tier.cached_bytes() == 0
    tier.close()


def test_the_file_has_no_name_and_takes_its_room_at_once(disk: Path) -> None:
    before = set(disk.iterdir())
    tier = FileTier(disk)
    assert tier.describe().startswith(f"file in {disk}")
    tier.reserve(MB)
    tier.reserve(MB // 2)
    assert set(disk.iterdir()) - before == set()
    status = os.fstat(tier._file)
    assert (status.st_size, status.st_blocks * 512 >= MB) == (MB, True)
    tier.close()


def test_the_end_of_the_file_is_an_error(disk: Path) -> None:
    tier = FileTier(disk)
    tier.reserve(MB)
    with pytest.raises(OSError, match="ends early"):
        tier.read(MB - 4096, tier.buffer(8192), None)
    tier.close()


def test_buffers_are_given_back_to_the_system(disk: Path) -> None:
    tier = FileTier(disk)
    before = private_bytes()
    buffer = tier.buffer(64 * MB).fill_(1)
    assert private_bytes() - before > 60 * MB
    del buffer
    assert private_bytes() - before < 4 * MB


def test_a_directory_in_memory_is_refused() -> None:
    if filesystem_of(SHM) != "tmpfs":
        pytest.skip(f"{SHM} is no tmpfs here")
    with pytest.raises(UsageError, match="is a tmpfs") as caught:
        FileTier(SHM)
    assert "directory=" in str(caught.value)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory"):
        FileTier(tmp_path / "missing")


def test_the_default_directory_is_tmpdir(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(disk))
    assert str(disk) in FileTier().describe()
    monkeypatch.delenv("TMPDIR")
    assert str(DISK) in FileTier().describe()


def test_a_directory_that_cannot_be_written_is_a_storage_error(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = FileTier(disk)
    monkeypatch.setattr(tier, "_directory", Path("/proc"))
    with pytest.raises(StorageError, match="cannot reserve"):
        tier.reserve(MB)


def test_a_filesystem_without_direct_access_is_read_through_the_cache(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuses(path: str, flags: int, *args: int, **kwargs: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuses)
    tier = FileTier(disk)
    tier.reserve(MB)
    assert "page cache" in tier.describe()
    tier.close()


def test_a_quota_shows_before_anything_is_moved(disk: Path) -> None:
    """A limit on file sizes stands for a full disk: the system refuses to allocate."""
    code = """
import resource, sys, torch
from halfbyte.errors import StorageError
from halfbyte.memory.layout import Field, Item
from halfbyte.memory.pool import Pool
from halfbyte.memory.resident import private_bytes
from halfbyte.memory.tiers import FileTier
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
pool = Pool(FileTier(), fast_bytes=2**17, page_bytes=2**16)
small = pool.add([Item("small", 2**17, (Field("a", torch.float32),))])
try:
    pool.add([Item("large", 2**20, (Field("a", torch.float32),))])
except StorageError as error:
    print(error)
for chunk in pool.walk():
    chunk.values[0].add_(1)
print(len(pool.items), pool.read(0)[0].sum().item() == 2**17)
"""
    environment = {**os.environ, "TMPDIR": str(disk)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert "cannot reserve" in done.stdout
    assert "File too large" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 True"


@pytest.mark.parametrize("direct", [True, False])
def test_a_pool_over_a_real_file(disk: Path, direct: bool) -> None:
    pool = Pool(FileTier(disk, direct=direct), fast_bytes=3 * 2**16, page_bytes=2**16)
    pool.add([Item("x", 200_001, (Field("a", torch.float32), Field("b", torch.float32)))])
    for _ in range(3):
        for chunk in pool.walk():
            chunk.values[0].add_(torch.arange(chunk.begin, chunk.end))
            chunk.values[1].sub_(1)
    a, b = pool.read(0)
    assert torch.equal(a, torch.arange(200_001) * 3.0)
    assert b.eq(-3).all()
    assert pool.stats().paged_in_bytes > 0
    pool.close()

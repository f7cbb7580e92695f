"""Accounting of this process against allocations of known size."""

import mmap
import threading
import time
from pathlib import Path

import pytest

from halfbyte.errors import UnsupportedError
from halfbyte.memory.resident import (
    PeakSampler,
    peak_bytes,
    private_bytes,
    reset_peak,
    resident,
)

MB = 2**20
SLACK = 4 * MB  # per-thread batches of the kernel's counters, and what Python itself takes


def take(num_bytes: int) -> mmap.mmap:
    """Anonymous memory, every page of it written, returned to the system when closed."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, num_bytes, 4096):
        memory[offset] = 1
    return memory


def test_an_allocation_is_counted_and_given_back() -> None:
    before = private_bytes()
    memory = take(64 * MB)
    assert abs(private_bytes() - before - 64 * MB) < SLACK
    memory.close()
    assert abs(private_bytes() - before) < SLACK


def test_the_peak_remembers_and_is_reset() -> None:
    if not reset_peak():
        pytest.skip("the kernel forbids resetting the peak here")
    before = resident()
    take(64 * MB).close()
    assert peak_bytes() - before.total > 64 * MB - SLACK
    assert reset_peak()
    assert peak_bytes() - before.total < SLACK


def test_file_pages_are_not_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(32 * MB))
    before = resident()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for offset in range(0, len(mapped), 4096):
            _ = mapped[offset]
        after = resident()
    assert after.file - before.file > 32 * MB - SLACK
    assert after.private - before.private < SLACK
    assert after.total == after.anonymous + after.file + after.shared
    assert after.peak >= after.total


def test_the_sampler_sees_a_peak_that_is_gone() -> None:
    before = private_bytes()
    with PeakSampler(interval=0.001) as sampler:
        memory = take(64 * MB)
        time.sleep(0.02)
        memory.close()
    assert abs(sampler.peak - before - 64 * MB) < SLACK


def test_the_sampler_takes_a_last_sample_and_leaves_no_thread() -> None:
    sampler = PeakSampler(interval=3600)
    sampler.start()
    sampler.start()
    memory = take(16 * MB)
    held = private_bytes()
    assert sampler.stop() > held - SLACK
    assert sampler.stop() == sampler.peak
    memory.close()
    assert not [t for t in threading.enumerate() if t.name == "peak-sampler"]
    sampler.reset()
    with sampler:
        pass
    assert 0 < sampler.peak < held - 16 * MB + SLACK


def test_without_proc_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="needs Linux"):
        resident(proc=tmp_path)
    with pytest.raises(UnsupportedError, match="needs Linux"):
        PeakSampler(proc=tmp_path)
    assert not reset_peak(proc=tmp_path)


def test_a_status_without_figures_names_them(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("Name:\tcat\nVmHWM:\t 12 kB\nRssAnon:\tmany kB\n")
    with pytest.raises(UnsupportedError, match="3 problems") as caught:
        resident(proc=tmp_path)
    assert "RssShmem" in str(caught.value)
    assert "VmHWM" not in str(caught.value)


def test_a_status_is_read_by_name_not_by_place(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text(
        "RssShmem:\t       4 kB\nName:\tRssAnon: 7 kB\nVmHWM:\t 1 kB\nRssAnon:\t1 kB\nRssFile:\t2 kB\n"
    )
    found = resident(proc=tmp_path)
    assert (found.anonymous, found.file, found.shared) == (1024, 2048, 4096)
    assert found.private == 5 * 1024
    assert found.peak == found.total == 7 * 1024

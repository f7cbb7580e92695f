"""Limits on memory, read from made-up and from real `/proc` and control groups."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.errors import UnsupportedError
from halfbyte.memory.available import Available, available_memory, limits

GB = 2**30
MEMINFO = (
    f"MemTotal: {24 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {20 * 2**20} kB\nHugePages_Total: 0\n"
)


class FakeSystem:
    """A `/proc` and a `/sys/fs/cgroup` under one directory."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.groups = root / "groups here"
        (self.proc / "self").mkdir(parents=True)
        self.groups.mkdir()
        (self.proc / "meminfo").write_text(MEMINFO)

    def mount(self, kind: str, membership: str, root: str = "/", options: str = "rw") -> None:
        point = str(self.groups).replace(" ", "\\040")
        (self.proc / "self" / "cgroup").write_text(membership)
        (self.proc / "self" / "mountinfo").write_text(
            "22 27 0:21 / /proc rw,relatime - proc proc rw\n"
            f"35 31 0:32 {root} {point} rw,relatime shared:9 - {kind} {kind} {options}\n"
        )

    def group(self, path: str, **files: object) -> Path:
        directory = self.groups / path
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name.replace("__", ".")).write_text(f"{content}\n")
        return directory


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path)


def test_without_groups_the_machine_is_the_limit(system: FakeSystem) -> None:
    expected = Available(20 * GB, 24 * GB, "the machine")
    assert available_memory(proc=system.proc) == expected


def test_version_2_counts_droppable_cache_as_free(system: FakeSystem) -> None:
    system.mount("cgroup2", "0::/run/job\n")
    stat = f"anon 5\ninactive_file {GB}\nactive_file 7"
    directory = system.group(
        "run/job", memory__max=4 * GB, memory__current=3 * GB, memory__stat=stat
    )
    found = available_memory(proc=system.proc)
    assert found == Available(2 * GB, 4 * GB, str(directory))


def test_a_group_above_may_be_the_tighter_one(system: FakeSystem) -> None:
    system.mount("cgroup2", "0::/run/job\n")
    system.group("run/job", memory__max="max", memory__current=GB)
    above = system.group("run", memory__max=3 * GB, memory__current=2 * GB)
    assert available_memory(proc=system.proc) == Available(GB, 3 * GB, str(above))


def test_version_1_is_read_from_the_memory_hierarchy(system: FakeSystem) -> None:
    system.mount("cgroup", "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n", options="rw,memory,cpu")
    directory = system.group(
        "job",
        memory__limit_in_bytes=2 * GB,
        memory__usage_in_bytes=3 * GB,
        memory__stat=f"inactive_file 1\ntotal_inactive_file {GB // 2}",
    )
    system.group(".", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=GB)
    assert available_memory(proc=system.proc) == Available(0, 2 * GB, str(directory))
    assert len(limits(proc=system.proc)) == 2, "the unlimited root group is no limit"


def test_other_version_1_hierarchies_are_ignored(system: FakeSystem) -> None:
    system.mount("cgroup", "4:memory:/\n", options="rw,cpu")
    system.group(".", memory__limit_in_bytes=1, memory__usage_in_bytes=0)
    assert available_memory(proc=system.proc).because == "the machine"


@pytest.mark.parametrize("root", ["/docker/abc", "/elsewhere"])
def test_in_a_container_the_mounted_group_is_ours(system: FakeSystem, root: str) -> None:
    system.mount("cgroup2", "0::/docker/abc\n", root=root)
    system.group(".", memory__max=GB, memory__current=0)
    assert available_memory(proc=system.proc) == Available(GB, GB, str(system.groups))


@pytest.mark.parametrize("membership", ["", "garbage\n", "0::\n", "4:memory\n"])
def test_garbled_membership_means_no_group(system: FakeSystem, membership: str) -> None:
    system.mount("cgroup2", membership)
    assert available_memory(proc=system.proc).because == "the machine"


def test_a_resource_limit_of_the_process_counts() -> None:
    code = (
        "import resource; from halfbyte.memory.available import available_memory\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({GB}, {GB}))\n"
        "a = available_memory(); print(a.because, a.limit, 0 < a.bytes < a.limit)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["RLIMIT_DATA", str(GB), "True"]


def test_here_the_answer_is_between_nothing_and_everything() -> None:
    found = available_memory()
    assert 0 < found.bytes <= found.limit
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        assert found.bytes > 64 * 2**20


def test_without_proc_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="MemAvailable"):
        available_memory(proc=tmp_path)

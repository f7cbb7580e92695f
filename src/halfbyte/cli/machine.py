"""What this machine is: processor, memory, limits, disks, as the kernel's files tell it.

Everything is read below a root directory, so that tests can show any machine. What a system does
not tell (another operating system, a closed /proc) is None or empty, never a guess.
"""

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

RELEVANT_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor.

    Attributes:
        model: Its name, or the architecture where there is none.
        features: Instruction sets that kernels care about, in the kernel's spelling.
        num_usable: Logical processors that this process may run on.
        quota: Processors' worth of time that the control group allows, or None without a limit.
    """

    model: str
    features: tuple[str, ...]
    num_usable: int
    quota: float | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory in bytes; None where it is not known.

    Attributes:
        total: Installed.
        available: What can be allocated without swapping, within the control group's limit.
        limit: Of the control group, when it is less than what is installed.
        swap_total: Size of the swap space.
        swap_used: Swap space in use.
        hugepages: Mode of transparent huge pages: `always`, `madvise` or `never`.
    """

    total: int | None
    available: int | None
    limit: int | None
    swap_total: int
    swap_used: int
    hugepages: str | None


@dataclass(frozen=True, slots=True)
class Disk:
    """Free space where files will be written.

    Attributes:
        purpose: What is kept there.
        path: A directory that exists on that file system.
        free: Bytes that an ordinary user may write.
    """

    purpose: str
    path: Path
    free: int


@dataclass(frozen=True, slots=True)
class Machine:
    """All that `doctor` knows about the hardware and its limits.

    Attributes:
        system: Operating system and its release.
        cpu: The processor.
        memory: Main memory.
        disks: Working directory and cache.
        thread_variables: Environment variables that set a number of threads.
        nvidia_driver: Whether the driver of an NVIDIA GPU is loaded.
        address_space_limit: Bytes that the process may map (`ulimit -v`), or None without a limit.
    """

    system: str
    cpu: Cpu
    memory: Memory
    disks: tuple[Disk, ...]
    thread_variables: Mapping[str, str]
    nvidia_driver: bool
    address_space_limit: int | None


def read_machine(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> Machine:
    """Describe the machine whose /proc and /sys are below `root`."""
    environment = os.environ if environment is None else environment
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        cpu=_read_cpu(root),
        memory=_read_memory(root),
        disks=(
            _disk("working directory", Path.cwd()),
            _disk("cache", cache_directory(environment)),
        ),
        thread_variables={
            name: environment[name] for name in THREAD_VARIABLES if name in environment
        },
        nvidia_driver=(root / "proc/driver/nvidia/version").exists(),
        address_space_limit=_address_space_limit(),
    )


def cache_directory(environment: Mapping[str, str]) -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/halfbyte` or `~/.cache/halfbyte`."""
    home = environment.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "halfbyte"


def _read_cpu(root: Path) -> Cpu:
    fields: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    features = set((fields.get("flags") or fields.get("Features") or "").split())
    affinity = getattr(os, "sched_getaffinity", None)
    return Cpu(
        model=fields.get("model name") or platform.processor() or platform.machine(),
        features=tuple(name for name in RELEVANT_FEATURES if name in features),
        num_usable=len(affinity(0)) if affinity else os.cpu_count() or 1,
        quota=_cpu_quota(root),
    )


def _cpu_quota(root: Path) -> float | None:
    quotas = []
    for group in _control_groups(root, ""):
        quota, _, period = _text(group / "cpu.max").strip().partition(" ")
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) / int(period))
    for group in _control_groups(root, "cpu"):
        quota = _text(group / "cpu.cfs_quota_us").strip()  # -1 without a limit
        period = _text(group / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _read_memory(root: Path) -> Memory:
    info = {}
    for line in _text(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        number = value.split()
        if number and number[0].isdigit():
            info[key] = int(number[0]) * 1024
    total, available = info.get("MemTotal"), info.get("MemAvailable")
    limit = None
    for group_limit, group_available in _memory_limits(root):
        if total is None or group_limit < total:
            limit = group_limit if limit is None else min(limit, group_limit)
            available = group_available if available is None else min(available, group_available)
    modes = _text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    return Memory(
        total=total,
        available=available,
        limit=limit,
        swap_total=info.get("SwapTotal", 0),
        swap_used=info.get("SwapTotal", 0) - info.get("SwapFree", 0),
        hugepages=modes[modes.index("[") + 1 : modes.index("]")] if "[" in modes else None,
    )


def _memory_limits(root: Path) -> list[tuple[int, int]]:
    """Limit and what is left of it, of every control group that has one."""
    limits = []
    for version_1, limit_name, usage_name, cache_name in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for group in _control_groups(root, version_1):
            limit, usage = _text(group / limit_name).strip(), _text(group / usage_name).strip()
            if not limit.isdigit():
                continue
            # Pages of files that nobody has touched lately are given up on demand.
            used = int(usage) if usage.isdigit() else 0
            used -= dict(_pairs(_text(group / "memory.stat"))).get(cache_name, 0)
            limits.append((int(limit), max(0, int(limit) - max(0, used))))
    return limits


def _control_groups(root: Path, controller: str) -> list[Path]:
    """Directories of this process's control group and its ancestors.

    Args:
        root: Where /proc and /sys are.
        controller: Of version 1, such as `memory`; empty for version 2.
    """
    mount = root / "sys/fs/cgroup" / controller
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controller in controllers.split(","):
            inner = mount / path.lstrip("/")
            # Inside a container the path is that of the host, and the mount is the group itself.
            return [p for p in (inner, *inner.parents) if p.is_relative_to(mount) and p.is_dir()]
    return []


def _disk(purpose: str, path: Path) -> Disk:
    existing = next(p for p in (path, *path.parents) if p.exists())
    return Disk(purpose, existing, shutil.disk_usage(existing).free)


def _address_space_limit() -> int | None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _pairs(text: str) -> list[tuple[str, int]]:
    words = [line.split() for line in text.splitlines()]
    return [(w[0], int(w[1])) for w in words if len(w) == 2 and w[1].isdigit()]  # noqa: PLR2004


def _text(path: Path) -> str:
    """What the file says, or nothing where the system has no such file or keeps it closed."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

"""What this machine is: processor, memory, limits, disks, as the kernel's files tell it.

Everything is read below a root directory, so that tests can show any machine. What a system does
not tell (another operating system, a closed /proc) is None or empty, never a guess.
"""

import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import UnsupportedError
from halfbyte.memory.available import Available, limits

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
        available: What can be allocated without swapping, within all limits.
        limits: Of control groups and of the process, as far as they are below what is installed.
        swap_total: Size of the swap space.
        swap_used: Swap space in use.
        hugepages: Mode of transparent huge pages: `always`, `madvise` or `never`.
    """

    total: int | None
    available: int | None
    limits: tuple[Available, ...]
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
        load: Threads that ran or wanted to, over the last minute; None where it is not known.
    """

    system: str
    cpu: Cpu
    memory: Memory
    disks: tuple[Disk, ...]
    thread_variables: Mapping[str, str]
    nvidia_driver: bool
    load: float | None


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
        load=_load(root),
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
    figures = dict(_pairs(_text(root / "proc/meminfo").replace(":", "").replace(" kB", "")))
    swap_total = 1024 * figures.get("SwapTotal", 0)
    modes = _text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    try:
        machine, *others = limits(proc=root / "proc")
    except UnsupportedError:  # not Linux
        machine, others = None, []
    tightest = min((limit.bytes for limit in [machine, *others] if limit), default=None)
    return Memory(
        total=None if machine is None else machine.limit,
        available=tightest,
        limits=tuple(limit for limit in others if machine is None or limit.limit < machine.limit),
        swap_total=swap_total,
        swap_used=swap_total - 1024 * figures.get("SwapFree", 0),
        hugepages=modes[modes.index("[") + 1 : modes.index("]")] if "[" in modes else None,
    )


def _control_groups(root: Path, controller: str) -> list[Path]:
    """Directories of this process's control group and its ancestors.

    Args:
        root: Where /proc and /sys are.
        controller: Of version 1, such as `cpu`; empty for version 2.
    """
    mount = root / "sys/fs/cgroup" / controller
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controller in controllers.split(","):
            inner = mount / path.lstrip("/")
            # Inside a container the path is that of the host, and the mount is the group itself.
            return [p for p in (inner, *inner.parents) if p.is_relative_to(mount) and p.is_dir()]
    return []


def _load(root: Path) -> float | None:
    first = _text(root / "proc/loadavg").partition(" ")[0]
    return float(first) if re.fullmatch(r"\d+\.\d+", first) else None


def _disk(purpose: str, path: Path) -> Disk:
    existing = next(p for p in (path, *path.parents) if p.exists())
    return Disk(purpose, existing, shutil.disk_usage(existing).free)


def _pairs(text: str) -> list[tuple[str, int]]:
    words = [line.split() for line in text.splitlines()]
    return [(w[0], int(w[1])) for w in words if len(w) == 2 and w[1].isdigit()]  # noqa: PLR2004


def _text(path: Path) -> str:
    """What the file says, or nothing where the system has no such file or keeps it closed."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

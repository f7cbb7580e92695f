"""Known problems of a machine or installation, with the commands that fix them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from halfbyte.cli.machine import Machine
from halfbyte.cli.output import format_bytes
from halfbyte.cli.software import Software

LOW_MEMORY = 2 << 30
"""A 135M-parameter model trains in less than this; importing torch alone takes a quarter GiB."""

LOW_DISK = 5 << 30
"""Room for a 7B-parameter model in 4 bits and a run beside it."""

BUSY = 2.0
"""Load a processor from which parallel work suffers: with 11 threads on 2 processors, quantizing a
model took more than ten minutes in two threads and one minute in one."""

MINIMUM_TORCH = (2, 13)

REBUILD = "pip install --force-reinstall --no-deps --no-build-isolation --editable ."
"""In the clone."""

RAISE_LIMIT = {"RLIMIT_AS": "ulimit -v unlimited", "RLIMIT_DATA": "ulimit -d unlimited"}
"""Limit of a process -> the command that lifts it."""

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that stops or slows halfbyte here.

    Attributes:
        code: Short stable name.
        severity: `error`: nothing works; `warning`: less than this machine can do; `note`: worth
            knowing.
        what: What was found and what it costs.
        fix: A command that mends it, or shows what to do; empty when nothing can be done.
    """

    code: str
    severity: Severity
    what: str
    fix: str


def diagnose(machine: Machine, software: Software) -> list[Problem]:
    """All known problems, the worst first."""
    order: list[Severity] = ["error", "warning", "note"]
    found = [
        *_packages(software),
        *_torch(machine, software),
        *_kernels(machine, software),
        *_memory(machine),
        *_disks(machine),
        *_threads(machine),
    ]
    return sorted(found, key=lambda problem: order.index(problem.severity))


def _packages(software: Software) -> Iterator[Problem]:
    missing = [name for name, version in software.required.items() if version is None]
    if missing:
        names = " ".join(missing)
        yield Problem(
            "missing-package",
            "error",
            f"required packages are missing: {names}",
            f"pip install {names}",
        )


def _torch(machine: Machine, software: Software) -> Iterator[Problem]:
    torch = software.torch
    minimum = ".".join(map(str, MINIMUM_TORCH))
    if torch.version is None:
        if software.required.get("torch") is not None:
            yield Problem(
                "torch-broken",
                "error",
                f"torch is installed and does not import: {torch.failure}",
                "pip install --force-reinstall torch",
            )
        return
    if _release(torch.version) < MINIMUM_TORCH:
        yield Problem(
            "torch-old",
            "error",
            f"torch {torch.version} is installed, {minimum} or newer is needed",
            f"pip install 'torch>={minimum}'",
        )
    public = torch.version.partition("+")[0]
    if torch.cuda and not torch.gpus and not machine.nvidia_driver:
        yield Problem(
            "torch-cuda-without-gpu",
            "note",
            f"torch is built for CUDA {torch.cuda} and there is no GPU: gigabytes of libraries "
            "that nothing uses",
            f"pip install torch=={public} --index-url https://download.pytorch.org/whl/cpu",
        )
    elif machine.nvidia_driver:
        yield Problem(
            "gpu-unused",
            "note",
            "there is an NVIDIA GPU: this version computes on the processor",
            "",
        )


def _kernels(machine: Machine, software: Software) -> Iterator[Problem]:
    idle = [b for b in software.backends if b.name == "native" and not b.in_use]
    if idle and idle[0].broken:
        yield Problem("kernels-broken", "error", idle[0].reason, REBUILD)
    elif idle and software.compiler is None:
        yield Problem(
            "no-compiler",
            "warning",
            "the C++ kernels are not built and there is no C++ compiler: plain torch is used",
            f"sudo apt-get install g++ && {REBUILD}",
        )
    elif idle:
        yield Problem(
            "native-unused",
            "warning",
            f"the C++ kernels are not in use: {idle[0].reason}",
            REBUILD,
        )
    features = set(machine.cpu.features)
    if features and not features & {"avx2", "asimd"}:
        yield Problem(
            "old-cpu",
            "note",
            "the processor has no AVX2: only the portable kernels run, several times slower",
            "",
        )


def _memory(machine: Machine) -> Iterator[Problem]:
    memory = machine.memory
    if memory.available is not None and memory.available < LOW_MEMORY:
        yield Problem(
            "low-memory",
            "warning",
            f"{format_bytes(memory.available)} of memory are available",
            "ps -eo rss,pid,comm --sort=-rss | head",
        )
    for limit in memory.limits:
        total = "unknown" if memory.total is None else format_bytes(memory.total)
        yield Problem(
            "memory-limit",
            "note",
            f"{limit.because} limits memory to {format_bytes(limit.limit)} (installed: {total})",
            RAISE_LIMIT.get(limit.because, ""),
        )
    if memory.swap_used > memory.swap_total // 2:
        yield Problem(
            "swapping",
            "warning",
            f"{format_bytes(memory.swap_used)} of {format_bytes(memory.swap_total)} swap are in "
            "use: what is swapped out comes back page by page",
            "vmstat 1 5",
        )
    if memory.hugepages == "never":
        yield Problem(
            "no-hugepages",
            "note",
            "transparent huge pages are off: fresh buffers are mapped in pieces of 4 KiB",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )


def _disks(machine: Machine) -> Iterator[Problem]:
    for disk in machine.disks:
        if disk.free < LOW_DISK:
            yield Problem(
                "low-disk",
                "warning",
                f"{format_bytes(disk.free)} are free for the {disk.purpose}, {disk.path}",
                f"du -xh --max-depth=1 {disk.path} | sort -h | tail",
            )


def _threads(machine: Machine) -> Iterator[Problem]:
    usable = machine.cpu.num_usable
    for name, value in machine.thread_variables.items():
        if not value.isdigit() or int(value) < 1:
            yield Problem(
                "threads-malformed", "warning", f"{name}={value!r} is not a number", f"unset {name}"
            )
        elif int(value) > usable:
            yield Problem(
                "threads-too-many",
                "warning",
                f"{name}={value} on {usable} usable processors: threads wait for each other",
                f"export {name}={usable}",
            )
        elif int(value) < usable:
            yield Problem(
                "threads-few",
                "warning",
                f"{name}={value} leaves {usable - int(value)} of {usable} processors idle",
                f"unset {name}",
            )
    if machine.load is not None and machine.load > BUSY * usable:
        yield Problem(
            "busy",
            "warning",
            f"{machine.load:g} threads compete for {usable} processors: parallel work waits at "
            "every step for threads that are not running",
            "export OMP_NUM_THREADS=1",
        )
    quota = machine.cpu.quota
    if quota is not None and quota < usable and not machine.thread_variables:
        threads = max(1, int(quota))
        yield Problem(
            "cpu-quota",
            "warning",
            f"a control group allows {quota:g} of {usable} processors' time: more threads than "
            "that are stopped in mid-work",
            f"export OMP_NUM_THREADS={threads}",
        )


def _release(version: str) -> tuple[int, ...]:
    parts = version.partition("+")[0].split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())

"""Timing of several ways to do one thing, and the physical floor beside them.

The ways take turns, so that a slow second of a shared machine hits all of them; a ratio is the
median of the ratios within a turn. A subject first passes its gate, a check that the fast way
computes the right thing: a red gate raises, and nothing of the subject is printed.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch

Action = Callable[[], object]

RESULTS = Path(__file__).parent / "results"
PEERS = ("torch", "bitsandbytes", "transformers", "peft")


class GateError(AssertionError):
    """The fast way is wrong: its speed means nothing."""


@dataclass(frozen=True, slots=True)
class Row:
    """One case: medians in milliseconds, and what the others take relative to ours.

    Attributes:
        case: What was done.
        ours: Median time of halfbyte.
        peers: Name -> median time.
        ratios: Name -> median over turns of peer time / our time; above 1, we are faster.
        floor: The time that the machine's memory or arithmetic allows.
        floor_reason: What that floor is.
        target: What was promised, as `peer >= ratio`.
        met: Whether the promise is kept in this run; None without one.
    """

    case: str
    ours: float
    peers: dict[str, float]
    ratios: dict[str, float]
    floor: float
    floor_reason: str
    target: str = ""
    met: bool | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """Something to measure.

    Attributes:
        name: What the command line calls it.
        title: Of its table.
        gate: Raises GateError if results are wrong.
        measure: The rows.
    """

    name: str
    title: str
    gate: Callable[[], None]
    measure: Callable[["Machine", int], list[Row]]


@dataclass(frozen=True, slots=True)
class Machine:
    """What the machine can do, measured; rates in bytes and operations a second.

    `matmul_dtype` is what PyTorch multiplies fastest, bfloat16 or float32.
    """

    cpu: str
    cores: int
    threads: int
    features: list[str]
    read_rate: float
    write_rate: float
    matmul_rate: float
    matmul_dtype: str
    versions: dict[str, str] = field(default_factory=dict)

    def reading(self, num_bytes: float) -> float:
        """Milliseconds to read from memory."""
        return num_bytes / self.read_rate * 1e3

    def writing(self, num_bytes: float) -> float:
        """Milliseconds to write to memory."""
        return num_bytes / self.write_rate * 1e3

    def multiplying(self, operations: float) -> float:
        """Milliseconds at the rate of PyTorch's largest matmul, bfloat16 or float32."""
        return operations / self.matmul_rate * 1e3


@dataclass
class Clock:
    """What is measured: time that passes, or time of this thread on the processor.

    The second is for a machine that others use, where waiting for a core would drown the work.
    It counts one thread only.
    """

    read: Callable[[], float] = time.perf_counter


CLOCK = Clock()


def seconds(action: Action) -> float:
    """The time of one call."""
    begin = CLOCK.read()
    action()
    return CLOCK.read() - begin


def take_turns(actions: Sequence[Action], turns: int) -> list[list[float]]:
    """Milliseconds of each action in each turn, after two calls of each to warm up."""
    for action in actions:
        action()
        action()
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(turns):
        for record, action in zip(times, actions, strict=True):
            record.append(seconds(action) * 1e3)
    return times


def compare(
    case: str,
    ours: Action,
    peers: dict[str, Action],
    turns: int,
    floor: tuple[float, str],
    targets: dict[str, float] | None = None,
    *,
    ours_last: bool = False,
) -> Row:
    """Measure one case. `targets` maps peers to the least ratio that was promised.

    We begin each turn, or with `ours_last` we end it: who follows whom can be worth a percent.
    """
    if ours_last:
        *their_times, our_times = take_turns([*peers.values(), ours], turns)
    else:
        our_times, *their_times = take_turns([ours, *peers.values()], turns)
    named = dict(zip(peers, their_times, strict=True))
    ratios = {
        name: statistics.median(t / o for t, o in zip(record, our_times, strict=True))
        for name, record in named.items()
    }
    targets = targets or {}
    return Row(
        case,
        statistics.median(our_times),
        {name: statistics.median(record) for name, record in named.items()},
        ratios,
        *floor,
        ", ".join(f"{name} >= {least:.3g}" for name, least in targets.items()),
        all(ratios[name] >= least for name, least in targets.items()) if targets else None,
    )


def describe_machine() -> Machine:
    """Name the machine and measure its rates."""
    model, features = platform.machine(), []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(
            (part.strip() for part in line.split(":", 1))
            for line in cpuinfo.read_text(encoding="utf-8").splitlines()
            if ":" in line
        )
        model = lines.get("model name", model)
        flags = set(lines.get("flags", "").split())
        family = f"family {lines.get('cpu family', '?')}, model {lines.get('model', '?')}"
        model = f"{model} ({family})"
        features = sorted(flags & {"avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16"})
    big = torch.empty(1 << 28, dtype=torch.uint8).fill_(1)
    floats = big.view(torch.float32)
    actions: list[Action] = [floats.sum, lambda: big.fill_(2)]
    read, write = (min(record) / 1e3 for record in take_turns(actions, 7))
    rates = {str(dtype).removeprefix("torch."): _matmul_rate(dtype) for dtype in MATMUL_DTYPES}
    fastest = max(rates, key=lambda name: rates[name])
    return Machine(
        cpu=model,
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        features=features,
        read_rate=big.numel() / read,
        write_rate=big.numel() / write,
        matmul_rate=rates[fastest],
        matmul_dtype=fastest,
        versions={"python": platform.python_version()} | _versions(),
    )


MATMUL_DTYPES = (torch.bfloat16, torch.float32)
"""What could be the fastest; the other may be a hundred times as slow."""


def _matmul_rate(dtype: torch.dtype) -> float:
    """Operations a second of PyTorch's product of large matrices."""
    rows, size = 1024, 2048
    a, b = torch.randn(rows, size).to(dtype), torch.randn(size, size).to(dtype)
    (record,) = take_turns([lambda: a @ b.T], 3)
    return 2 * rows * size * size / (min(record) / 1e3)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("halfbyte", *PEERS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def table(subject: Subject, rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        f"### {subject.title}",
        "",
        "| case | halfbyte | peers (their time, ours divides it by) | floor | promised |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        peers = "; ".join(
            f"{name} {time:.3g} ms (**{row.ratios[name]:.3g}x**)"
            for name, time in row.peers.items()
        )
        promise = f"{row.target}: {'met' if row.met else 'missed'}" if row.target else ""
        lines.append(
            f"| {row.case} | {row.ours:.3g} ms | {peers} | {row.floor:.3g} ms, "
            f"{row.floor_reason} | {promise} |"
        )
    return "\n".join(lines)


def save(
    subject: Subject, rows: Sequence[Row], machine: Machine, command: str, suffix: str = ""
) -> Path:
    """Write the rows with everything needed to read them later; returns the file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{subject.name}{suffix}.json"
    record = {
        "subject": subject.name,
        "command": command,
        "machine": asdict(machine),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path

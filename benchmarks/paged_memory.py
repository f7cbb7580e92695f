"""Training with a paged optimizer: what it takes of memory, and under a limit.

    python -m benchmarks.paged_memory MODEL_DIRECTORY peaks [--budget 128]
    python -m benchmarks.paged_memory MODEL_DIRECTORY limited [--budget 128]

`peaks`: VmHWM and private memory of processes that take two steps, each with another optimizer. The
last drops its gradients and has no state: what it takes is the rest of the run.
`limited`: the paged run in a control group (version 1) whose limit is the rest of the run and the
budget; then the resident run in the same group. Needs root.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.paged_run import LENGTH, MB, NOTHING, open_run, run_arguments, save
from halfbyte.memory.resident import PeakSampler, peak_bytes

GROUPS = Path("/sys/fs/cgroup/memory")
HELD = "memory.max_usage_in_bytes"


@dataclass(frozen=True, slots=True)
class Taken:
    """What a run of two steps took.

    Attributes:
        optimizer: Its name.
        peak: VmHWM.
        private: The most private bytes.
        cached: Page cache of the slow tier's file.
        pool: The most that paged state and gradients took of memory.
        seconds: Of the last step.
        slow_tier: What it is.
    """

    optimizer: str
    peak: int
    private: int
    cached: int | None
    pool: int
    seconds: float
    slow_tier: str


def take_steps(arguments: argparse.Namespace) -> None:
    """Take steps in this process and print what it took."""
    name = arguments.optimizer
    fast_bytes = arguments.budget * MB if name.startswith("paged") else None
    with PeakSampler(interval=0.002) as sampler:
        run = open_run(arguments, name, fast_bytes)
        with run.reusing():
            seconds = [run.step().seconds for _ in range(2)]
    stats = run.stats()
    taken = Taken(
        name,
        peak_bytes(),
        sampler.peak,
        stats.cached_bytes,
        stats.peak_resident_bytes,
        seconds[-1],
        stats.slow_tier,
    )
    print(json.dumps(asdict(taken)))


def child(arguments: argparse.Namespace, optimizer: str, group: Path | None = None) -> Taken | int:
    """Steps in a process of its own, in a control group if one is given; how it ended if badly."""
    command = [sys.executable, "-m", "benchmarks.paged_memory", str(arguments.model), "steps"]
    command += ["--optimizer", optimizer, "--dtype", arguments.dtype]
    for option in ("method", "documents", "directory", "budget"):
        command += [f"--{option}", str(getattr(arguments, option))]

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(  # noqa: S603
        command, check=False, stdout=subprocess.PIPE, text=True, preexec_fn=enter
    )
    return Taken(**json.loads(done.stdout)) if done.returncode == 0 else done.returncode


def finished(taken: Taken | int) -> Taken:
    """What a run took that must not fail."""
    if isinstance(taken, int):
        raise SystemExit(f"a run without a limit ended with {taken}")
    return taken


def measure_peaks(arguments: argparse.Namespace) -> list[Taken]:
    """What each optimizer takes."""
    found: list[Taken] = []
    print("| optimizer | private, MB | VmHWM, MB | less than `adamw` by, MB | page cache, MB |")
    print("|---|---|---|---|---|")
    for name in ("adamw", "paged_adamw", "adamw_8bit", "paged_adamw_8bit", NOTHING):
        taken = finished(child(arguments, name))
        found.append(taken)
        cached = "unknown" if taken.cached is None else f"{taken.cached / MB:.0f}"
        print(
            f"| `{name}` | {taken.private / MB:.0f} | {taken.peak / MB:.0f} "
            f"| {(found[0].peak - taken.peak) / MB:.0f} | {cached} |"
        )
    return found


def measure_limited(arguments: argparse.Namespace) -> dict[str, object]:
    """Under a limit of what else the run needs and the budget."""
    group = GROUPS / f"halfbyte-{os.getpid()}"
    group.mkdir()
    try:
        finished(child(arguments, NOTHING))  # so that files are in the page cache already
        finished(child(arguments, NOTHING, group))
        # The kernel's own peak misses nothing. What is cached in the end is no need of the run.
        rest = int((group / HELD).read_text()) - _cached(group)
        limit = rest + arguments.budget * MB
        print(
            f"limit: {rest / MB:.0f} MB for the rest of the run, {arguments.budget} MB of budget: "
            f"{limit / MB:.0f} MB"
        )
        (group / "memory.force_empty").write_text("0")
        (group / "memory.limit_in_bytes").write_text(str(limit))
        record: dict[str, object] = {"rest": rest, "limit": limit}
        for name in ("paged_adamw", "adamw"):
            (group / HELD).write_text("0")
            taken = child(arguments, name, group)
            held = int((group / HELD).read_text())
            record[name] = {
                "held": held,
                "taken": taken if isinstance(taken, int) else asdict(taken),
            }
            if isinstance(taken, int):
                how = f"ended with {taken}"
            else:
                how = f"two steps, {taken.private / MB:.0f} MB private, {taken.pool / MB:.0f} of it"
                how += f" in the pool, the last step in {taken.seconds:.1f} s"
            print(f"{name}: {how}; the group held {held / MB:.0f} MB at most")
        return record
    finally:
        group.rmdir()


def _cached(group: Path) -> int:
    """Page cache that is charged to a group."""
    lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    return next(int(number) for name, number in lines if name == "cache")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Paged training: memory.")
    run_arguments(parser)
    parser.add_argument("what", choices=["peaks", "limited", "steps"])
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--optimizer", default="paged_adamw")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "steps":
        take_steps(arguments)
        return
    print(f"two steps of {arguments.documents * LENGTH} tokens, {arguments.dtype}")
    if arguments.what == "peaks":
        record: dict[str, object] = {"runs": [asdict(t) for t in measure_peaks(arguments)]}
    else:
        record = measure_limited(arguments)
    if arguments.json:
        command = " ".join(["python -m benchmarks.paged_memory", *sys.argv[1:]])
        save(arguments.json, {"command": command, **record})


if __name__ == "__main__":
    main()

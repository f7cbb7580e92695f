"""Fine-tuning of all weights with a paged optimizer: step time and memory by budget.

    python benchmarks/paged_training.py MODEL_DIRECTORY time [--budgets 2000 512 128 32]
    python benchmarks/paged_training.py MODEL_DIRECTORY memory [--budget 128]
    python benchmarks/paged_training.py MODEL_DIRECTORY limited [--budget 128]

`time`: one process changes the budget of its paged optimizer from step to step, in turn, so that
other work on the machine hits all of them; each budget is compared with the largest, which holds
everything, in the same round. Writes the figures as JSON, and with `--plot` as a picture.
`memory`: VmHWM of processes that take two steps, resident and paged.
`limited`: the paged run in a control group (version 1) whose limit is what the rest of the run
needs and the budget; then the resident run in the same group. Needs root.

Documents of 512 random tokens, by default 4 a step, in one micro-batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.data.batch import Batch
from halfbyte.layers.segments import pack
from halfbyte.memory.resident import PeakSampler, peak_bytes
from halfbyte.optim.accumulators import Accumulator
from halfbyte.optim.factory import footprint, make_optimizer, weight_decay_groups
from halfbyte.optim.optimizer import StatefulOptimizer
from halfbyte.training.config_file import load_config
from halfbyte.training.methods import TrainedModel, open_trained_model
from halfbyte.training.step import compute_gradients

MB = 10**6
LENGTH = 512
GROUPS = Path("/sys/fs/cgroup/memory")


@dataclass
class Run:
    """A model and what trains it."""

    model: TrainedModel
    optimizer: StatefulOptimizer
    accumulator: Accumulator
    batch: Batch

    def step(self) -> float:
        """Take a step; its seconds."""
        begun = time.perf_counter()
        compute_gradients(self.model.decoder, [self.batch], self.accumulator, max_norm=1.0)
        self.optimizer.step()
        self.model.refresh()
        return time.perf_counter() - begun


def open_run(arguments: argparse.Namespace, name: str, fast_bytes: int | None) -> Run:
    """Everything for steps on the model; `fast_bytes` for a paged optimizer."""
    config = load_config(
        None,
        [
            f"model={arguments.model}",
            "data.train=none",
            "output.dir=none",
            f"training.method={arguments.method}",
            f"training.compute_dtype={arguments.dtype}",
        ],
    )
    model = open_trained_model(config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        0,
        model.decoder.config.vocabulary_size,
        (arguments.documents * LENGTH,),
        generator=generator,
    )
    rows = tuple(f"document {number}" for number in range(arguments.documents))
    batch = Batch(tokens, tokens.roll(-1), pack([LENGTH] * len(rows)), rows)
    groups = weight_decay_groups(model.parameters.items(), 0.01)
    optimizer = make_optimizer(
        name,
        [dict(group) for group in groups],
        fast_bytes=fast_bytes,
        directory=None if fast_bytes is None else arguments.directory,
        lr=1e-5,
    )
    return Run(model, optimizer, optimizer.accumulator(model.stand_ins), batch)


def measure_time(arguments: argparse.Namespace) -> None:
    """Steps under budgets in turn."""
    budgets = sorted(arguments.budgets, reverse=True)
    run = open_run(arguments, arguments.optimizer, budgets[0] * MB)
    run.step()
    rows: dict[int, list[dict[str, float]]] = {budget: [] for budget in budgets}
    for _ in range(arguments.rounds):
        for budget in budgets:
            run.optimizer.set_fast_bytes(budget * MB)
            run.step()  # fills the budget, or empties it
            before = run.optimizer.stats()
            seconds = run.step()
            moved = run.optimizer.stats().since(before)
            pages = moved.paged_in_bytes + moved.paged_out_bytes
            row = {"seconds": seconds, "stall": moved.stall_seconds, "moved_mb": pages / MB}
            rows[budget].append(row)
            print(f"{budget:6} MB: {row}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    everything = rows[budgets[0]]
    print("budget MB  step s  step / all resident  stall s  moved MB")
    table = []
    for budget in budgets:
        pairs = zip(rows[budget], everything, strict=True)
        entry = {
            "budget_mb": budget,
            "seconds": statistics.median(row["seconds"] for row in rows[budget]),
            "ratio": statistics.median(row["seconds"] / base["seconds"] for row, base in pairs),
            "stall": statistics.median(row["stall"] for row in rows[budget]),
            "moved_mb": statistics.median(row["moved_mb"] for row in rows[budget]),
        }
        table.append(entry)
        print(
            f"{budget:9} {entry['seconds']:7.2f} {entry['ratio']:20.3f} {entry['stall']:8.2f} "
            f"{entry['moved_mb']:9.0f}"
        )
    if arguments.plot:
        total = run.optimizer.stats().total_bytes
        draw(table, total, arguments.plot)


def draw(table: list[dict[str, float]], total: int, picture: Path) -> None:
    """Step time over budget."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    budgets = [min(entry["budget_mb"], total / MB) for entry in table]
    axes.plot(budgets, [entry["seconds"] for entry in table], "o-", color="C0", label="step")
    waits = [entry["stall"] for entry in table]
    axes.plot(budgets, waits, "o-", color="C1", label="of it, waiting for the disk")
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{budget:,.0f}" for budget in budgets])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"budget in MB, of {total / MB:,.0f} MB of state and gradients")
    axes.set_ylabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=100)


def two_steps(arguments: argparse.Namespace) -> None:
    """Take steps in this process and print what it took."""
    fast_bytes = arguments.budget * MB if arguments.optimizer.startswith("paged") else None
    with PeakSampler(interval=0.002) as sampler:
        run = open_run(arguments, arguments.optimizer, fast_bytes)
        seconds = [run.step() for _ in range(arguments.steps)]
    stats = run.optimizer.stats()
    sizes = [parameter.numel() for parameter in run.model.parameters.values()]
    print(
        json.dumps(
            {
                "peak": peak_bytes(),
                "private": sampler.peak,
                "cached": stats.cached_bytes,
                "seconds": seconds,
                "held": footprint(arguments.optimizer, sizes, fast_bytes=fast_bytes).resident,
                "slow_tier": stats.slow_tier,
            }
        )
    )


def child(
    arguments: argparse.Namespace, optimizer: str, group: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A process that takes two steps, in a control group if one is given."""
    command = [sys.executable, __file__, str(arguments.model), "steps", "--dtype", arguments.dtype]
    command += ["--optimizer", optimizer, "--budget", str(arguments.budget)]
    command += ["--directory", str(arguments.directory), "--method", arguments.method]
    command += ["--documents", str(arguments.documents)]

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.run(  # noqa: S603
        command,
        check=group is None,
        capture_output=True,
        text=True,
        preexec_fn=enter,
    )


def measure_memory(arguments: argparse.Namespace) -> None:
    """Peaks of resident and paged runs."""
    base = 0
    for name in ("adamw", "paged_adamw", "adamw_8bit", "paged_adamw_8bit"):
        found = json.loads(child(arguments, name).stdout)
        base = base or found["peak"]
        print(
            f"{name:17} peak {found['peak'] / MB:6.0f} MB, "
            f"private {found['private'] / MB:6.0f} MB, "
            f"{(base - found['peak']) / MB:5.0f} MB less; page cache of the file "
            f"{found['cached'] / MB:.0f} MB ({found['slow_tier']})"
        )


def measure_limited(arguments: argparse.Namespace) -> None:
    """Under a limit of what else the run needs and the budget."""
    found = json.loads(child(arguments, "paged_adamw").stdout)
    rest = found["private"] - found["held"]  # the largest gradient is whole for a moment: it counts
    limit = rest + arguments.budget * MB
    print(f"limit: {rest / MB:.0f} MB + {arguments.budget} MB = {limit / MB:.0f} MB")
    group = GROUPS / f"halfbyte-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        for name in ("paged_adamw", "adamw"):
            (group / "memory.max_usage_in_bytes").write_text("0")
            done = child(arguments, name, group)
            most = int((group / "memory.max_usage_in_bytes").read_text())
            how = f"ended with {done.returncode}"
            if done.returncode == 0:
                took = json.loads(done.stdout)
                how = f"{took['private'] / MB:.0f} MB private, steps {took['seconds']} s"
            print(f"{name}: {how}; the group held {most / MB:.0f} MB at most")
    finally:
        group.rmdir()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Paged training: time and memory by budget.")
    parser.add_argument("model", type=Path)
    parser.add_argument("what", choices=["time", "memory", "limited", "steps"])
    parser.add_argument("--method", default="full", choices=["full", "lora", "qlora"])
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[2000, 512, 128, 32])
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--optimizer", default="paged_adamw")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))  # noqa: S108
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    {
        "time": measure_time,
        "memory": measure_memory,
        "limited": measure_limited,
        "steps": two_steps,
    }[arguments.what](arguments)


if __name__ == "__main__":
    main()

"""Training with a paged optimizer: step time by budget.

    python -m benchmarks.paged_training MODEL_DIRECTORY [--budgets 2000 512 128 32]

A run with the same optimizer, not paged, and one whose budget changes from step to step take turns,
each in a process of its own, so that other work on the machine hits both; a step is compared with
the resident one just before it. Pairs during which others used the processor are left out. With
`--json FILE` further rounds are added to those in the file. Beside that, the rate of the disk:
pages read and written at once, by two threads, as the pool does it. What an update moves takes so
long at least, whatever the arithmetic.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.paged_run import MB, StepFigures, open_run, run_arguments, save
from halfbyte.memory.layout import PAGE_BYTES
from halfbyte.memory.stats import PoolStats
from halfbyte.memory.tiers import FileTier

_DISK_PAGES = 128
_THREADS = 2


@dataclass(frozen=True, slots=True)
class Pair:
    """A resident step and the paged one after it."""

    budget_mb: int
    resident: StepFigures
    paged: StepFigures

    @property
    def alone(self) -> bool:
        """Whether the times mean something."""
        return self.resident.alone and self.paged.alone


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """Medians of the steps at a budget.

    Attributes:
        budget_mb: The budget; None without paging.
        num_steps: Steps.
        seconds: Of a step.
        ratio: Of it and the resident step before it.
        update_seconds: Of the optimizer's part.
        stall_seconds: Waiting for the disk.
        moved_mb: Both ways, in a step.
        floor_seconds: What the update moves, at the rate of the disk.
    """

    budget_mb: int | None
    num_steps: int
    seconds: float
    ratio: float
    update_seconds: float
    stall_seconds: float
    moved_mb: float
    floor_seconds: float


def disk_rate(directory: Path) -> float:
    """Bytes a second, of pages that are read and pages that are written together."""
    tier = FileTier(directory)
    tier.reserve(2 * _DISK_PAGES * PAGE_BYTES)

    def move(thread: int) -> None:
        buffer = tier.buffer(PAGE_BYTES)
        for page in range(thread, _DISK_PAGES, _THREADS):
            tier.write(page * PAGE_BYTES, buffer, None)
            tier.read((_DISK_PAGES + page) * PAGE_BYTES, buffer, None)

    # Once written, for blocks that never were are not read from the disk.
    page = tier.buffer(PAGE_BYTES)
    for number in range(2 * _DISK_PAGES):
        tier.write(number * PAGE_BYTES, page, None)
    begun = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as executor:
        list(executor.map(move, range(_THREADS)))
    seconds = time.perf_counter() - begun
    tier.close()
    return 2 * _DISK_PAGES * PAGE_BYTES / seconds


class Worker:
    """A run in a process of its own, which takes a step when it is told to."""

    def __init__(self, arguments: argparse.Namespace, name: str, fast_bytes: int | None) -> None:
        """Open it; `name` and `fast_bytes` are the optimizer's."""
        spawn = multiprocessing.get_context("spawn")
        self._connection, far_end = spawn.Pipe()
        self._process = spawn.Process(
            target=_serve, args=(far_end, arguments, name, fast_bytes), daemon=True
        )
        self._process.start()
        far_end.close()  # so that the end of the process is seen

    def settle(self, fast_bytes: int | None = None) -> PoolStats:
        """Change the budget, take a short step, which fills or empties it, and say what is held."""
        self._connection.send(("settle", fast_bytes))
        stats: PoolStats = self._connection.recv()
        return stats

    def step(self) -> StepFigures:
        """Take one."""
        self._connection.send(("step", None))
        figures: StepFigures = self._connection.recv()
        return figures


def _serve(
    connection: Connection, arguments: argparse.Namespace, name: str, fast_bytes: int | None
) -> None:
    run = open_run(arguments, name, fast_bytes)
    with run.reusing():
        while True:
            command, budget = connection.recv()
            if command == "step":
                connection.send(run.step())
                continue
            if budget is not None and run.optimizer is not None:
                run.optimizer.set_fast_bytes(budget)
            run.settle()
            connection.send(run.stats())


def measure(arguments: argparse.Namespace) -> None:
    """Steps in turn."""
    budgets = sorted(arguments.budgets, reverse=True)
    resident = Worker(arguments, arguments.optimizer, None)
    paged = Worker(arguments, f"paged_{arguments.optimizer}", budgets[0] * MB)
    rates, pairs = _earlier(arguments.json)
    resident.step()  # it keeps the memory of activations for the next
    budget_before, held = None, paged.settle()
    for _ in range(arguments.rounds):
        rates.append(disk_rate(arguments.directory))
        for budget in budgets:
            if budget != budget_before:
                held = paged.settle(budget * MB)
                paged.step()
                budget_before = budget
            pairs.append(Pair(budget, resident.step(), paged.step()))
            alone = "" if pairs[-1].alone else "left out: "
            print(f"{alone}{pairs[-1]}", file=sys.stderr)
            if arguments.json:
                record: dict[str, object] = {
                    "command": " ".join(["python -m benchmarks.paged_training", *sys.argv[1:]]),
                    "disk_mb_per_second": [rate / MB for rate in rates],
                    "rows": [asdict(row) for row in summarize(pairs, statistics.median(rates))],
                    "pairs": [asdict(pair) for pair in pairs],
                }
                save(arguments.json, record)
    rows = summarize(pairs, statistics.median(rates))
    rate = statistics.median(rates) / MB
    print(f"disk, read and written at once: {rate:.0f} MB/s; {held.slow_tier}")
    print_table(rows)
    if arguments.plot and rows:
        draw(rows, held.total_bytes, arguments.plot)


def summarize(pairs: Sequence[Pair], rate: float) -> list[BudgetRow]:
    """The resident steps, then those under each budget."""
    pairs = [pair for pair in pairs if pair.alone]
    if not pairs:
        return []
    rows = [_row(None, [(pair.resident, pair.resident) for pair in pairs], rate)]
    for budget in sorted({pair.budget_mb for pair in pairs}, reverse=True):
        chosen = [(pair.resident, pair.paged) for pair in pairs if pair.budget_mb == budget]
        rows.append(_row(budget, chosen, rate))
    return rows


def print_table(rows: Sequence[BudgetRow]) -> None:
    """As Markdown."""
    print(
        "| budget, MB | steps | step, s | ratio | update, s | stalled, s | moved, MB | least, s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.budget_mb or 'resident'} | {row.num_steps} | {row.seconds:.2f} "
            f"| {row.ratio:.3f} | {row.update_seconds:.2f} | {row.stall_seconds:.2f} "
            f"| {row.moved_mb:.0f} | {row.floor_seconds:.2f} |"
        )


def _earlier(path: Path | None) -> tuple[list[float], list[Pair]]:
    """The disk rates and pairs of a file that is there already."""
    if path is None or not path.exists():
        return [], []
    record = json.loads(path.read_text())
    pairs = [
        Pair(p["budget_mb"], StepFigures(**p["resident"]), StepFigures(**p["paged"]))
        for p in record["pairs"]
    ]
    return [rate * MB for rate in record["disk_mb_per_second"]], pairs


def _row(
    budget: int | None, pairs: Sequence[tuple[StepFigures, StepFigures]], rate: float
) -> BudgetRow:
    steps = [step for _, step in pairs]
    return BudgetRow(
        budget,
        num_steps=len(pairs),
        seconds=statistics.median(step.seconds for step in steps),
        ratio=statistics.median(step.seconds / base.seconds for base, step in pairs),
        update_seconds=statistics.median(step.update_seconds for step in steps),
        stall_seconds=statistics.median(step.stall_seconds for step in steps),
        moved_mb=statistics.median(step.moved_bytes for step in steps) / MB,
        floor_seconds=statistics.median(step.moved_in_update for step in steps) / rate,
    )


def draw(rows: Sequence[BudgetRow], total: int, picture: Path) -> None:
    """How much longer steps are than resident ones, over the budget."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    resident = next(row for row in rows if row.budget_mb is None)
    paged = [(min(row.budget_mb, total / MB), row) for row in rows if row.budget_mb is not None]
    budgets = [budget for budget, _ in paged]
    whole = [100 * (row.ratio - 1) for _, row in paged]
    updates = [
        100 * (row.update_seconds - resident.update_seconds) / resident.seconds for _, row in paged
    ]
    axes.axhline(0, color="0.7", linewidth=1)
    axes.plot(budgets, updates, "o-", color="C1", label="by the optimizer's part")
    axes.plot(budgets, whole, "o", color="C0", label="whole steps, noise included")
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{budget:,.0f}" for budget in budgets])
    axes.minorticks_off()
    axes.set_xlabel(f"budget in MB, of {total / MB:,.0f} MB of state and gradients")
    axes.set_ylabel("% longer than resident")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(picture, dpi=100)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Paged training: step time by budget.")
    run_arguments(parser)
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "adamw_8bit"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[2000, 512, 128, 32])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measure(arguments)


if __name__ == "__main__":
    main()

"""Whether runs take the memory that was predicted.

Measured <= predicted <= measured + max(5 %, 30 MB).

    python -m benchmarks.memory_plan SMOLLM2_NF4 SMOLLM2_BF16 GEMMA3_NF4 [--only NAME ...]

Every case is a whole `halfbyte train`, from reading the data to writing the adapter, in a process
of its own; its peak is the maximum resident set size that the kernel reports to the parent. The
prediction is the one that the run itself made before its first step. Prints a table, writes
`benchmarks/results/memory_plan.json`, and fails when a case breaks the promise.
"""

import argparse
import json
import random
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks import harness
from benchmarks.processes import run_alone

MEGABYTE = 10**6


@dataclass(frozen=True, slots=True)
class Case:
    """A configuration.

    Attributes:
        name: For the table.
        model: `smollm2-nf4`, `smollm2-bf16` or `gemma3-nf4`.
        settings: What differs from the defaults.
    """

    name: str
    model: str
    settings: tuple[str, ...]


FP32 = "training.compute_dtype=fp32"
CASES = (
    Case("qlora, 512 tokens", "smollm2-nf4", (FP32, "training.micro_batch_tokens=512")),
    Case("qlora, 1024 tokens", "smollm2-nf4", (FP32, "training.micro_batch_tokens=1024")),
    Case("qlora, bf16", "smollm2-nf4", ("training.micro_batch_tokens=512",)),
    Case(
        "qlora, all recomputed",
        "smollm2-nf4",
        (FP32, "training.micro_batch_tokens=768", "memory.recompute=all"),
    ),
    Case(
        "qlora, some recomputed",
        "smollm2-nf4",
        (FP32, "training.micro_batch_tokens=768", "memory.recompute=auto", "memory.budget=1GB"),
    ),
    Case(
        "qlora, rank 128",
        "smollm2-nf4",
        (FP32, "training.micro_batch_tokens=512", "lora.rank=128", "memory.recompute=all"),
    ),
    Case(
        "qlora, rank 128, 8-bit state",
        "smollm2-nf4",
        (FP32, "training.micro_batch_tokens=512", "lora.rank=128", "optimizer.name=adamw_8bit"),
    ),
    Case(
        "qlora, no held-out split, rank 4",
        "smollm2-nf4",
        ("training.micro_batch_tokens=640", "data.eval_fraction=0", "lora.rank=4"),
    ),
    Case(
        "qlora, evaluated first, recomputed",
        "smollm2-nf4",
        (FP32, "memory.recompute=all", "training.eval_first=true", "data.eval_fraction=0.3"),
    ),
    Case(
        "qlora, dropout, one micro-batch",
        "smollm2-nf4",
        (FP32, "training.tokens_per_step=600", "lora.dropout=0.1"),
    ),
    Case("lora, 512 tokens", "smollm2-bf16", (FP32, "training.method=lora", "lora.rank=8",
         "training.micro_batch_tokens=512")),
    Case("full, 384 tokens", "smollm2-bf16", (FP32, "training.method=full",
         "training.micro_batch_tokens=384", "training.keep_checkpoints=1")),
    Case("lora, paged", "smollm2-bf16", (FP32, "training.method=lora", "lora.rank=64",
         "training.micro_batch_tokens=512", "optimizer.name=paged_adamw",
         "optimizer.fast_bytes=64MB")),
    Case("full, paged, bf16", "smollm2-bf16", ("training.method=full",
         "training.micro_batch_tokens=384", "optimizer.name=paged_adamw_8bit",
         "optimizer.fast_bytes=64MB", "training.keep_checkpoints=1")),
    Case("Gemma, 384 tokens", "gemma3-nf4", (FP32, "training.micro_batch_tokens=384")),
    Case("Gemma, bf16, all recomputed", "gemma3-nf4", ("training.micro_batch_tokens=384",
         "memory.recompute=all")),
    Case("Gemma, rank 64, attention only", "gemma3-nf4", (FP32, "lora.rank=64",
         "lora.targets=[q_proj, k_proj, v_proj, o_proj]", "training.micro_batch_tokens=512")),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """One case, in bytes."""

    name: str
    settings: str
    recompute: int
    predicted: int
    measured: int

    @property
    def above(self) -> int:
        """How much more was predicted than taken."""
        return self.predicted - self.measured

    @property
    def kept(self) -> bool:
        """Whether the promise is."""
        return 0 <= self.above <= max(0.05 * self.measured, 30 * MEGABYTE)


def write_data(path: Path) -> Path:
    """Prompts and completions of 30 to 300 tokens or so, out of words of a file that stays."""
    rng = random.Random(0)  # noqa: S311  (made-up documents)
    words = (Path(__file__).parents[1] / "LICENSE").read_text().split()
    rows = []
    for number in range(300):
        begin = rng.randrange(len(words) - 160)
        chosen = words[begin : begin + rng.randint(20, 150)]
        rows.append(
            {
                "prompt": f"{number}: {' '.join(chosen[:8])}",
                "completion": " " + " ".join(chosen[8:]),
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_case(case: Case, model: Path, folder: Path, steps: int) -> Measured:
    """Train a few steps, with evaluation, checkpoint and result."""
    out = folder / case.name.replace(" ", "-").replace(",", "")
    budget = () if any("budget" in s for s in case.settings) else ("memory.budget=12GB",)
    defaults = ("training.tokens_per_step=1100", f"training.max_steps={steps}",
                "data.max_length=384", "data.overlong=truncate")  # fmt: skip
    command = [
        sys.executable, "-m", "halfbyte", "train", "--model", str(model),
        "--data", str(write_data(folder / "train.jsonl")), "--out", str(out), "--json",
        *defaults, *budget, *case.settings,
    ]  # fmt: skip
    measured = run_alone(*command).peak
    plan = json.loads((out / "plan.json").read_text())
    return Measured(
        name=case.name,
        settings=" ".join((case.model, *case.settings)),
        recompute=plan["recompute"],
        predicted=plan["peak_bytes"],
        measured=measured,
    )


def table(rows: list[Measured]) -> str:
    """As Markdown."""
    lines = [
        "| case | settings | layers recomputed | measured | predicted | above | promise |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | `{row.settings}` | {row.recompute} | {row.measured / MEGABYTE:,.0f} MB | "
        f"{row.predicted / MEGABYTE:,.0f} MB | {row.above / MEGABYTE:+.0f} MB, "
        f"{row.above / row.measured:+.1%} | {'kept' if row.kept else 'broken'} |"
        for row in rows
    ]
    return "\n".join(lines)


def read_results(path: Path) -> dict[str, Measured]:
    """Of cases that were run before, by name."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    names = [field.name for field in fields(Measured)]
    return {row["name"]: Measured(**{name: row[name] for name in names}) for row in rows}


def write_results(path: Path, rows: list[Measured]) -> None:
    """With the machine, in the order of the cases."""
    record = {
        "subject": "memory_plan",
        "command": "python -m benchmarks.memory_plan SMOLLM2_NF4 SMOLLM2_BF16 GEMMA3_NF4",
        "machine": asdict(harness.describe_machine()),
        "rows": [{**asdict(row), "kept": row.kept} for row in rows],
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def main() -> int:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs=3, type=Path, metavar="DIRECTORY")
    parser.add_argument("--only", nargs="*", help="names of cases; results of others are kept")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="on a disk, not in memory")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "memory_plan.json")
    arguments = parser.parse_args()
    models = dict(zip(("smollm2-nf4", "smollm2-bf16", "gemma3-nf4"), arguments.models, strict=True))
    results = read_results(arguments.out) if arguments.only else {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        for case in CASES:
            if arguments.only and case.name not in arguments.only:
                continue
            row = run_case(case, models[case.model], Path(folder), arguments.steps)
            results[case.name] = row
            print(
                f"{row.name}: measured {row.measured / MEGABYTE:.0f}, predicted "
                f"{row.predicted / MEGABYTE:.0f}, {row.recompute} recomputed: "
                f"{'kept' if row.kept else 'BROKEN'}",
                flush=True,
            )
            rows = [results[case.name] for case in CASES if case.name in results]
            write_results(arguments.out, rows)
    print(table(rows))
    return int(not all(row.kept for row in rows))


if __name__ == "__main__":
    sys.exit(main())

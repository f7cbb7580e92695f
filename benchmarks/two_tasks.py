"""Adapters of two real tasks and every way of combining them, by held-out loss on both tasks.

    python -m benchmarks.two_tasks MODEL_NF4 E2E_DIRECTORY GSM8K_DIRECTORY OUT [--steps 40]

Rows are restaurant descriptions (E2E NLG) and worked answers to school problems (GSM8K). Training,
calibration, probe, search and held-out rows are disjoint, by prompt. Certificates are made on the
probe rows, and compared with what merges keep on held-out rows. What is there already is not made
again, so the command can be stopped and started again.
"""

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import halfbyte as hb
from benchmarks.e2e import OPTIONS, SEPARATOR, read_rows
from benchmarks.harness import RESULTS
from halfbyte.composition.certificate import Certificate
from halfbyte.composition.four_bit_merge import PLAIN
from halfbyte.data.batch import evaluation_batches
from halfbyte.data.read import load_dataset
from halfbyte.training.held_out import score_held_out

TASKS = ("e2e", "gsm8k")
CALIBRATION, PROBE, SEARCH, HELD_OUT = 50, 30, 24, 40
"""Rows of a task; half as many for GSM8K, whose rows are three times as long."""

MIXES = {
    "mean": "0.5*e2e + 0.5*gsm8k",
    "sum": "e2e + gsm8k",
    "ties": "ties(e2e, gsm8k, density=0.5)",
    "dare": "dare(e2e, gsm8k, drop=0.3, seed=1)",
    "svd": "svd(e2e + gsm8k, rank=16)",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One model.

    Attributes:
        name: What it is.
        losses: Mean held-out loss of each task, in nats.
        verdict: Of the certificate, on the probe; None for what is no merge.
        gain_on_probe: Part of the adapter's gain that the certificate saw; None without one.
    """

    name: str
    losses: Mapping[str, float]
    verdict: str | None = None
    gain_on_probe: float | None = None


def main() -> None:
    """Prepare, train, combine, merge, measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_tasks", description=__doc__)
    for name in ("model", *TASKS, "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    prepare(options)
    rows = [measured(options, "base", options.model, ())]
    adapters = {task: train(options, task, task) for task in TASKS}
    rows += [measured(options, task, options.model, [path]) for task, path in adapters.items()]
    upper = train(options, "e2e-on-gsm8k", "e2e", below=adapters["gsm8k"])
    stack = [adapters["gsm8k"], upper]
    rows.append(measured(options, "stack gsm8k > e2e", options.model, stack))
    for name, expression in MIXES.items():
        path = once(out / name, lambda to, e=expression: hb.compose(e, adapters=adapters, out=to))
        rows.append(measured(options, expression, options.model, [path]))
    found = once(
        out / "searched",
        lambda to: hb.compose(
            adapters=adapters, search=out / "both-search.jsonl", model=options.model, out=to
        ),
    )
    composition = json.loads((found / "provenance.json").read_text())["composition"]
    expression = composition["expression"]
    rows.append(measured(options, f"searched: {expression}", options.model, [found]))
    rows += merges(options, "e2e", adapters["e2e"])
    report(options, rows)


def prepare(options: argparse.Namespace) -> None:
    """Write the rows of each part of both tasks, and of both together."""
    parts: dict[str, dict[str, list[dict[str, str]]]] = {}
    for task in TASKS:
        keys = ("prompt", "completion") if task == "e2e" else ("question", "answer")
        rows = {
            split: [
                {"prompt": row[keys[0]] + SEPARATOR, "completion": row[keys[1]]}
                for row in read_rows(getattr(options, task) / f"{split}.jsonl")
            ]
            for split in ("train", "test")
        }
        parts[task] = divide(rows["train"], rows["test"], 1 if task == "e2e" else 2)
    for part in parts["e2e"]:
        for task in TASKS:
            write(options.out / f"{task}-{part}.jsonl", parts[task][part])
        both = [row for task in TASKS for row in parts[task][part]]
        write(options.out / f"both-{part}.jsonl", both)


def divide(
    train: Sequence[dict[str, str]], test: Sequence[dict[str, str]], fewer: int
) -> dict[str, list[dict[str, str]]]:
    """Disjoint parts by prompt; held out are rows of the test set whose prompts are not trained."""
    rng = random.Random(0)  # noqa: S311
    prompts = sorted({row["prompt"] for row in train})
    fresh = [row for row in test if row["prompt"] not in set(prompts)]
    parts = {"heldout": rng.sample(fresh, HELD_OUT // fewer)}
    rng.shuffle(prompts)
    left = list(train)
    for name, count in (("calibration", CALIBRATION), ("probe", PROBE), ("search", SEARCH)):
        part: list[dict[str, str]] = []
        while len(part) < count // fewer:
            prompt = prompts.pop()
            part += [row for row in left if row["prompt"] == prompt]
            left = [row for row in left if row["prompt"] != prompt]
        parts[name] = part
    return {**parts, "train": left}


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """A row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """A directory, made unless it is there."""
    if not path.exists():
        make(path)
    return path


def train(options: argparse.Namespace, name: str, task: str, below: Path | None = None) -> Path:
    """The adapter of a finished run."""
    directory: Path = options.out / f"run-{name}"
    if (directory / "config.yaml").exists():
        hb.resume(directory)
        return directory / "adapter"
    hb.train(
        model=options.model,
        data={"train": str(options.out / f"{task}-train.jsonl"), "eval_fraction": 0.005},
        out=directory,
        training={"max_steps": options.steps, "tokens_per_step": 1024, "learning_rate": 1e-3},
        lora={"rank": 16, "alpha": 32} | ({"on_top_of": str(below)} if below else {}),
    )
    return directory / "adapter"


def measured(
    options: argparse.Namespace,
    name: str,
    model: Path,
    adapters: Sequence[Path],
    certificate: Certificate | None = None,
    strategy: str | None = None,
) -> Row:
    """Held-out losses of a model, in float32 products."""
    opened = hb.load(model, adapters=list(adapters), compute_dtype=torch.float32)
    losses = {}
    for task in TASKS:
        path = options.out / f"{task}-heldout.jsonl"
        dataset = load_dataset(str(path), opened.tokenizer, OPTIONS).dataset
        losses[task] = score_held_out(opened.decoder, evaluation_batches(dataset, 1024)).loss
    row = Row(name, losses, *verdict(certificate, strategy))
    print(row, flush=True)
    return row


def verdict(
    certificate: Certificate | None, strategy: str | None
) -> tuple[str | None, float | None]:
    """What the certificate says, or would say, of a strategy; and the gain it keeps."""
    if certificate is None or strategy is None:
        return None, None
    judged = Certificate(
        certificate.live, certificate.strategies, strategy, certificate.limits, False, {}
    )
    return "refused" if judged.faults() else "passes", judged.gain_kept(strategy)


def merges(options: argparse.Namespace, name: str, adapter: Path) -> list[Row]:
    """Merges of one adapter, each with its certificate."""
    out: Path = options.out
    rows = []
    for dtype in ("bf16", "nf4"):
        merge = hb.merge(
            options.model,
            adapter,
            out=out / f"merged-{name}-{dtype}",
            dtype=dtype,
            calibration=out / f"{name}-calibration.jsonl" if dtype == "nf4" else None,
            probe=out / f"{name}-probe.jsonl",
            accept=True,
            replace=True,
        )
        made = merge.certificate
        label = f"{name} merged: {made.chosen}"
        rows.append(measured(options, label, merge.path, [], made, made.chosen))
    source = out / f"merged-{name}-bf16"
    plain = once(out / f"plain-{name}", lambda to: hb.quantize_model(source, to))
    rows.append(measured(options, f"{name} merged: {PLAIN}", plain, [], made, PLAIN))
    return rows


def report(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Print the table, and save it."""
    print("| model | E2E | GSM8K | certificate | gain on probe |\n|---|---|---|---|---|")
    for row in rows:
        gain = "" if row.gain_on_probe is None else f"{row.gain_on_probe:.1%}"
        losses = " | ".join(f"{row.losses[task]:.4f}" for task in TASKS)
        print(f"| {row.name} | {losses} | {row.verdict or ''} | {gain} |")
    command = f"python -m benchmarks.two_tasks ... --steps {options.steps}"
    content = {"command": command, "rows": [asdict(row) for row in rows]}
    (RESULTS / "two_tasks.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

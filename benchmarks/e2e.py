"""Fine-tune on E2E NLG by `qlora`, `lora` and `full`, and compare them on the test set.

    python -m benchmarks.e2e MODEL_NF4 MODEL_16BIT E2E_DIRECTORY OUT [--seeds 3] [--steps 64]

E2E_DIRECTORY holds `train.jsonl` and `test.jsonl`, rows of `prompt` and `completion`. Every run
sees the same rows, steps and seeds; a newline separates a prompt from its completion. Held-out
loss and perplexity are those of the completions of `--test-rows` test rows, drawn once. BLEU
(sacrebleu) compares greedy continuations of `--prompts` test inputs with all references of each.
Last comes the first `qlora` again with 8-bit state.
Runs that are there already are not repeated, so the command can be stopped and started again.
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import sacrebleu
import torch

import halfbyte as hb
from halfbyte.data.batch import evaluation_batches
from halfbyte.data.options import DataOptions, Overlong
from halfbyte.data.read import load_dataset
from halfbyte.training.held_out import HeldOutScore, score_held_out

SEPARATOR = "\n"
RATES = {"qlora": 1e-3, "lora": 1e-3, "full": 1e-4}
"""The learning rate of each method."""

OPTIONS = DataOptions(None, 2048, Overlong.REFUSE, train_on_prompt=False)


@dataclass(frozen=True, slots=True)
class Result:
    """One trained model, or a base alone, on the test set."""

    method: str
    seed: int | None
    loss: float
    perplexity: float
    accuracy: float
    bleu: float | None


def main() -> None:
    """Prepare, train, evaluate, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.e2e", description=__doc__)
    for name in ("model_nf4", "model_16bit", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--prompts", type=int, default=60, help="continued for BLEU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    references = prepare(options)
    four_bits, sixteen_bits = options.model_nf4, options.model_16bit
    results = [
        evaluate(options, "4-bit base", None, four_bits, [], references),
        evaluate(options, "16-bit base", None, sixteen_bits, [], references),
    ]
    for seed in range(options.seeds):
        for method, base in (("qlora", four_bits), ("lora", sixteen_bits)):
            adapter = train(options, method, seed, base) / "adapter"
            scored = references if seed == 0 else {}
            results.append(evaluate(options, method, seed, base, [adapter], scored))
    full = train(options, "full", 0, sixteen_bits) / "model"
    results.append(evaluate(options, "full", 0, full, [], references))
    adapter = train(options, "qlora", 0, four_bits, "adamw_8bit") / "adapter"
    results.append(evaluate(options, "qlora, adamw_8bit", 0, four_bits, [adapter], references))
    report(options, results)


def prepare(options: argparse.Namespace) -> dict[str, list[str]]:
    """Write the files that runs read; returns the references of the inputs for BLEU."""
    rng = random.Random(0)  # noqa: S311
    rows = {name: read_rows(options.data / f"{name}.jsonl") for name in ("train", "test")}
    write_rows(options.out / "train.jsonl", rows["train"])
    write_rows(options.out / "test.jsonl", rng.sample(rows["test"], options.test_rows))
    references: dict[str, list[str]] = {}
    for row in rows["test"]:
        references.setdefault(row["prompt"] + SEPARATOR, []).append(row["completion"])
    return {
        prompt: references[prompt] for prompt in rng.sample(sorted(references), options.prompts)
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """With the separator at the end of each prompt."""
    changed = [{**row, "prompt": row["prompt"] + SEPARATOR} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))


def train(
    options: argparse.Namespace, method: str, seed: int, base: Path, optimizer: str = "adamw"
) -> Path:
    """The directory of a finished run."""
    suffix = "" if optimizer == "adamw" else f"-{optimizer}"
    directory: Path = options.out / f"{method}-{seed}{suffix}"
    training: dict[str, Any] = {
        "method": method,
        "max_steps": options.steps,
        "tokens_per_step": options.tokens,
        "learning_rate": RATES[method],
        "seed": seed,
    }
    if (directory / "config.yaml").exists():
        hb.resume(directory)  # returns at once when there is nothing left to do
        return directory
    data = {"train": str(options.out / "train.jsonl"), "eval_fraction": 0.02}
    lora = {"rank": 16, "alpha": 32}
    hb.train(
        model=base,
        data=data,
        out=directory,
        training=training,
        lora=lora,
        optimizer={"name": optimizer},
    )
    return directory


def evaluate(
    options: argparse.Namespace,
    method: str,
    seed: int | None,
    base: Path,
    adapters: Sequence[Path],
    references: dict[str, list[str]],
) -> Result:
    """Loss on the test rows, and BLEU where references are given; kept in a file."""
    record: Path = options.out / f"{method}-{seed}.json".replace(", ", "-")
    if record.exists():
        return Result(**json.loads(record.read_text()))
    model = hb.load(base, adapters=list(adapters))
    dataset = load_dataset(str(options.out / "test.jsonl"), model.tokenizer, OPTIONS).dataset
    score: HeldOutScore = score_held_out(model.decoder, evaluation_batches(dataset, 2048))
    bleu = None
    if references:
        texts = model.generate(list(references), max_new_tokens=64, stop=["\n"])
        # sacrebleu takes one list for each n-th reference; those that have fewer leave gaps.
        columns = list(zip_longest(*references.values()))
        bleu = sacrebleu.corpus_bleu([text.strip() for text in texts], columns).score
    result = Result(method, seed, score.loss, score.perplexity, score.accuracy, bleu)
    print(result, flush=True)
    record.write_text(json.dumps(asdict(result)) + "\n")
    return result


def report(options: argparse.Namespace, results: Sequence[Result]) -> None:
    """Print the table and what the seeds say about qlora against lora; save both."""
    print("| method | seed | test loss | perplexity | accuracy | BLEU |\n|---|---|---|---|---|---|")
    for r in results:
        seed = "" if r.seed is None else str(r.seed)
        bleu = "" if r.bleu is None else f"{r.bleu:.1f}"
        print(
            f"| {r.method} | {seed} | {r.loss:.4f} | {r.perplexity:.3f} "
            f"| {r.accuracy:.1%} | {bleu} |"
        )
    losses = {m: [r.loss for r in results if r.method == m] for m in ("qlora", "lora")}
    relative = [
        four / sixteen - 1 for four, sixteen in zip(losses["qlora"], losses["lora"], strict=True)
    ]
    summary = {"relative_difference": statistics.mean(relative)}
    if len(relative) > 1:
        # Student's t for 95 % with n - 1 degrees of freedom.
        t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}[len(relative)]
        summary["interval"] = t * statistics.stdev(relative) / math.sqrt(len(relative))
    print("qlora against lora, held-out loss:", summary)
    content = {
        "command": " ".join(["python -m benchmarks.e2e", *sys.argv[5:]]),
        "steps": options.steps,
        "tokens_per_step": options.tokens,
        "threads": torch.get_num_threads(),
        "results": [asdict(r) for r in results],
        **summary,
    }
    path = Path(__file__).parent / "results" / "e2e.json"
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

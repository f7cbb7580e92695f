"""What both sides of the training benchmark are given: the same tokens, in the same batches."""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

BATCH_ROWS = 8
VOCABULARY = 30_000
"""Random tokens are below it: every model of the benchmark has more."""


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens, and how many at the beginning carry no loss."""

    tokens: list[int]
    num_prompt: int


def parse_arguments(description: str | None) -> argparse.Namespace:
    """The arguments of one run."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("--shape", default="4x512")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    return parser.parse_args()


def batches(arguments: argparse.Namespace) -> Iterator[list[Document]]:
    """As many batches as there are steps."""
    rng = random.Random(0)  # noqa: S311
    if arguments.data is None:
        documents, tokens = (int(n) for n in arguments.shape.split("x"))
        for _ in range(arguments.steps):
            yield [
                Document([rng.randrange(VOCABULARY) for _ in range(tokens)], 0)
                for _ in range(documents)
            ]
        return
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    rows = [json.loads(line) for line in arguments.data.read_text().splitlines()]
    rng.shuffle(rows)
    for step in range(arguments.steps):
        batch = []
        for row in rows[step * BATCH_ROWS : (step + 1) * BATCH_ROWS]:
            prompt = tokenizer.encode(row["prompt"] + "\n").ids
            completion = tokenizer.encode(row["completion"], add_special_tokens=False).ids
            batch.append(Document([*prompt, *completion, 0], len(prompt)))
        yield batch

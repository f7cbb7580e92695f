"""What a data set looks like in numbers, and a document as trained and untrained runs."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np

from halfbyte.data.dataset import Dataset
from halfbyte.data.packing import PackingOptions, pack, plan_epoch

MAX_BARS = 12
"""Most intervals of a histogram."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens a document: percentiles (the smallest length that so many reach) and extremes."""

    mean: float
    p50: int
    p90: int
    p99: int
    longest: int
    longest_at: str


@dataclass(frozen=True, slots=True)
class Interval:
    """One bar of a histogram: `count` documents of `first` to `last` tokens."""

    first: int
    last: int
    count: int


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is to learn from."""

    num_documents: int
    num_tokens: int
    num_targets: int
    num_duplicates: int
    lengths: Lengths
    histogram: tuple[Interval, ...]


@dataclass(frozen=True, slots=True)
class EpochShape:
    """How the first epoch is cut.

    Attributes:
        num_steps: Optimizer steps.
        num_micro_batches: Of all steps.
        mean_tokens: A step.
        mean_targets: A step.
    """

    num_steps: int
    num_micro_batches: int
    mean_tokens: float
    mean_targets: float


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of a document that are all trained, or all not."""

    trained: bool
    ids: tuple[int, ...]
    text: str


class Decoder(Protocol):
    """What is needed of a tokenizer to show tokens."""

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of tokens."""


def measure(dataset: Dataset) -> Size:
    """The size of a data set that has documents."""
    lengths = dataset.lengths
    p50, p90, p99 = np.percentile(lengths, [50, 90, 99], method="inverted_cdf").tolist()
    origin, longest = dataset.longest()
    return Size(
        num_documents=len(dataset),
        num_tokens=dataset.num_tokens,
        num_targets=dataset.num_targets,
        num_duplicates=dataset.num_duplicates(),
        lengths=Lengths(float(lengths.mean()), p50, p90, p99, longest, str(origin)),
        histogram=tuple(_histogram(lengths.tolist())),
    )


def _histogram(lengths: list[int]) -> Iterable[Interval]:
    """Intervals of one round width: 1, 2 or 5 times a power of ten."""
    shortest, longest = min(lengths), max(lengths)
    widths = (factor * 10**power for power in range(19) for factor in (1, 2, 5))
    width = next(w for w in widths if longest // w - shortest // w < MAX_BARS)
    counts = np.bincount(np.asarray(lengths) // width - shortest // width)
    first = shortest // width * width
    for number, count in enumerate(counts.tolist()):
        begin = first + number * width
        yield Interval(begin, begin + width - 1, count)


def shape_epoch(dataset: Dataset, options: PackingOptions) -> EpochShape:
    """How the first epoch is cut into steps and micro-batches; the others differ little."""
    plan = plan_epoch(dataset.lengths, options, epoch=0)
    num_micro_batches = sum(
        len(pack(dataset.lengths[plan.documents(step)].tolist(), options.micro_batch_tokens))
        for step in range(plan.num_steps)
    )
    return EpochShape(
        plan.num_steps,
        num_micro_batches,
        dataset.num_tokens / plan.num_steps,
        dataset.num_targets / plan.num_steps,
    )


def runs(dataset: Dataset, document: int, decoder: Decoder) -> list[Run]:
    """A document in runs of tokens that the loss asks for, and of those that it does not."""
    store = dataset.store
    number = int(dataset.index[document])
    start, end = int(store.starts[number]), int(store.ends[number])
    ids = store.tokens[start:end].tolist()
    # A token is trained if the position before it, perhaps in an earlier piece, predicts it.
    trained = [bool(at and store.has_target[at - 1]) for at in range(start, end)]
    found = []
    for is_trained, pairs in groupby(zip(trained, ids, strict=True), key=lambda pair: pair[0]):
        run = tuple(token for _, token in pairs)
        found.append(Run(is_trained, run, decoder.decode(run, skip_special=False)))
    return found

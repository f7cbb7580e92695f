"""The shape of micro-batches: how long their documents are, without the documents."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from halfbyte.data.batch import evaluated_together
from halfbyte.data.dataset import Dataset
from halfbyte.data.packing import PackingOptions, pack, plan_epoch
from halfbyte.layers.cross_entropy import rows_at_once

MAX_STEPS = 5000
"""Steps looked at for the largest micro-batch. Beyond, a larger one is rarer than one in thousands,
and then larger by a few tokens: budgets are filled to the brim by then."""


@dataclass(frozen=True, slots=True)
class MicroBatchShape:
    """What the memory and the time of a micro-batch depend on.

    Attributes:
        lengths: Tokens of each document, at least 1.
        num_targets: Tokens with loss, at least 1.
    """

    lengths: tuple[int, ...]
    num_targets: int

    @property
    def num_tokens(self) -> int:
        """Of all documents together."""
        return sum(self.lengths)

    def resized(self, num_tokens: int, max_targets: int | None = None) -> "MicroBatchShape":
        """About the same mix of documents in exactly that many tokens, at least 2.

        Args:
            num_tokens: Of the new shape.
            max_targets: Targets that it may have.
        """
        count = min(len(self.lengths), num_tokens // 2)
        totals = list(accumulate(self.lengths[:count]))
        ends = [0]
        for index, total in enumerate(totals):
            end = round(num_tokens * total / totals[-1])
            ends.append(min(max(end, ends[-1] + 1), num_tokens - (count - 1 - index)))
        lengths = tuple(end - begin for begin, end in pairwise(ends))
        wanted = round(num_tokens * self.num_targets / self.num_tokens)
        most = num_tokens - count if max_targets is None else min(max_targets, num_tokens - count)
        return MicroBatchShape(lengths, max(min(wanted, most), 1))


class BatchSize(NamedTuple):
    """What the peak of memory of a batch depends on.

    Attributes:
        num_tokens: Of all documents together.
        loss_rows: Targets whose logits are there at once.
    """

    num_tokens: int
    loss_rows: int


Sizes = frozenset[BatchSize]
"""None of which is at least as large as another in both numbers."""


@dataclass(frozen=True, slots=True)
class Workload:
    """All steps of a run.

    Attributes:
        largest: The micro-batch with the most tokens.
        most: The largest micro-batches by what is there already: optimizer state (in all steps but
            the first), and gradients (in all micro-batches of a step but the first).
        num_tokens: Of all steps together.
        total_micro_batches: Of all steps together.
    """

    largest: MicroBatchShape
    most: Mapping[tuple[bool, bool], Sizes]
    num_tokens: int
    total_micro_batches: int

    @property
    def loss_rows(self) -> int:
        """The most targets of any micro-batch whose logits are there at once."""
        return max(size.loss_rows for sizes in self.most.values() for size in sizes)

    @property
    def accumulates(self) -> bool:
        """Whether a step has more than one micro-batch."""
        return any(gradients for _, gradients in self.most)


def measure_workload(
    dataset: Dataset, options: PackingOptions, num_steps: int, vocabulary: int
) -> Workload:
    """Go through the steps of a run as they will come; after `MAX_STEPS`, by proportion."""
    looked_at = min(num_steps, MAX_STEPS)
    largest = MicroBatchShape((0,), 0)
    most: dict[tuple[bool, bool], Sizes] = {}
    num_tokens = num_batches = 0
    targets = dataset.store.num_targets[dataset.index]
    for number, step in enumerate(_steps(dataset, options, looked_at)):
        lengths = dataset.lengths[step].tolist()
        batches = pack(lengths, options.micro_batch_tokens)
        num_batches += len(batches)
        num_tokens += sum(lengths)
        for index, positions in enumerate(batches):
            shape = MicroBatchShape(
                tuple(lengths[position] for position in positions),
                int(targets[[step[position] for position in positions]].sum()),
            )
            size = BatchSize(shape.num_tokens, rows_at_once(shape.num_targets, vocabulary))
            present = (number > 0, index > 0)
            most[present] = _with(most.get(present, frozenset()), size)
            largest = max(largest, shape, key=lambda each: each.num_tokens)
    factor = num_steps / looked_at
    return Workload(
        largest=largest,
        most=most,
        num_tokens=round(factor * num_tokens),
        total_micro_batches=round(factor * num_batches),
    )


def _steps(dataset: Dataset, options: PackingOptions, num_steps: int) -> Iterator[list[int]]:
    """The documents of each step, epoch after epoch."""
    epoch = given = 0
    while True:
        plan = plan_epoch(dataset.lengths, options, epoch)
        for step in range(plan.num_steps):
            if given == num_steps:
                return
            yield plan.documents(step).tolist()
            given += 1
        epoch += 1


def measure_evaluation(dataset: Dataset, micro_batch_tokens: int, vocabulary: int) -> Sizes:
    """The largest batches of an evaluation."""
    targets = dataset.store.num_targets[dataset.index].tolist()
    most: Sizes = frozenset()
    for documents in evaluated_together(dataset.lengths.tolist(), micro_batch_tokens):
        count = sum(targets[document] for document in documents)
        rows = rows_at_once(count, vocabulary) if count else 0
        most = _with(most, BatchSize(int(dataset.lengths[list(documents)].sum()), rows))
    return most


def _with(sizes: Sizes, size: BatchSize) -> Sizes:
    """One more, unless another exceeds it, and without those that it exceeds."""
    if any(_exceeds(other, size) for other in sizes):
        return sizes
    return frozenset(other for other in sizes if not _exceeds(size, other)) | {size}


def _exceeds(size: BatchSize, other: BatchSize) -> bool:
    return size.num_tokens >= other.num_tokens and size.loss_rows >= other.loss_rows

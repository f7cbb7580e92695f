"""The shape of micro-batches: how long their documents are, without the documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from halfbyte.data.dataset import Dataset
from halfbyte.data.packing import PackingOptions, pack, plan_epoch

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

    def resized(self, num_tokens: int, *, min_targets: int = 1) -> "MicroBatchShape":
        """About the same mix of documents in exactly that many tokens, at least 2.

        Args:
            num_tokens: Of the new shape.
            min_targets: Targets that it should have, as far as this one has them and they fit.
        """
        count = min(len(self.lengths), num_tokens // 2)
        totals = list(accumulate(self.lengths[:count]))
        ends = [0]
        for index, total in enumerate(totals):
            end = round(num_tokens * total / totals[-1])
            ends.append(min(max(end, ends[-1] + 1), num_tokens - (count - 1 - index)))
        lengths = tuple(end - begin for begin, end in pairwise(ends))
        wanted = max(
            round(num_tokens * self.num_targets / self.num_tokens),
            min(min_targets, self.num_targets),
        )
        return MicroBatchShape(lengths, max(min(wanted, num_tokens - count), 1))


@dataclass(frozen=True, slots=True)
class Workload:
    """All steps of a run.

    Attributes:
        largest: The micro-batch with the most tokens; its targets are the most of any.
        num_micro_batches: Of the largest step.
        num_tokens: Of all steps together.
        total_micro_batches: Of all steps together.
    """

    largest: MicroBatchShape
    num_micro_batches: int
    num_tokens: int
    total_micro_batches: int


def measure_workload(dataset: Dataset, options: PackingOptions, num_steps: int) -> Workload:
    """Go through the steps of a run as they will come; after `MAX_STEPS`, by proportion."""
    looked_at = min(num_steps, MAX_STEPS)
    largest: tuple[int, ...] = ()
    most_targets = most_batches = num_tokens = num_batches = 0
    targets = dataset.store.num_targets[dataset.index]
    for step in _steps(dataset, options, looked_at):
        lengths = dataset.lengths[step].tolist()
        batches = pack(lengths, options.micro_batch_tokens)
        most_batches = max(most_batches, len(batches))
        num_batches += len(batches)
        num_tokens += sum(lengths)
        for positions in batches:
            most_targets = max(most_targets, int(targets[[step[p] for p in positions]].sum()))
            shape = tuple(lengths[position] for position in positions)
            largest = max(largest, shape, key=sum)
    factor = num_steps / looked_at
    return Workload(
        largest=MicroBatchShape(largest, most_targets),
        num_micro_batches=most_batches,
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

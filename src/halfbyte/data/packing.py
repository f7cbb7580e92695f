"""Which documents make a step, and which of these a micro-batch.

A step is filled in the order of the epoch until the next document would exceed its budget. So
what a step learns from depends on `tokens_per_step` alone: cutting it into other micro-batches
changes nothing but rounding. Inside a step, documents go into micro-batches by first fit,
longest first. A document is never split.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.dataset import Dataset
from halfbyte.data.order import shuffled
from halfbyte.errors import ConfigError, DataError

GROUPED_STEPS = 32
"""Steps among which documents are grouped by length: enough to group well, few enough to mix."""


@dataclass(frozen=True, slots=True)
class PackingOptions:
    """How documents become steps. Valid once built.

    Attributes:
        tokens_per_step: Most tokens of a step.
        micro_batch_tokens: Most tokens of a micro-batch: what is in memory at once.
        seed: Of the order.
        group_by_length: Put documents of similar length into the same step. Without padding
            this saves no tokens; it evens out the memory and time of attention.
    """

    tokens_per_step: int
    micro_batch_tokens: int
    seed: int = 0
    group_by_length: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "micro_batch_tokens"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"training.{name}: at least 1 expected, found {value}")


@dataclass(frozen=True, slots=True, eq=False)
class EpochPlan:
    """S steps over D documents.

    Attributes:
        order: int64 `[D]`; documents in the order in which they are used.
        bounds: int64 `[S, 2]`; step s takes `order[bounds[s, 0] : bounds[s, 1]]`.
    """

    order: NDArray[np.int64]
    bounds: NDArray[np.int64]

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.bounds)

    def documents(self, step: int) -> NDArray[np.int64]:
        """The documents of a step, in order."""
        begin, end = self.bounds[step]
        return self.order[begin:end]


def plan_epoch(lengths: NDArray[np.int64], options: PackingOptions, epoch: int) -> EpochPlan:
    """Plan one pass over all documents, each exactly once.

    Args:
        lengths: int64 `[D]`; tokens of each document, none above the budgets.
        options: Budgets and seed.
        epoch: Counted from 0; each has an order of its own.
    """
    order = shuffled(len(lengths), seed=options.seed, epoch=epoch, purpose="documents")
    if not options.group_by_length:
        return EpochPlan(order, _fill(lengths[order], options.tokens_per_step))
    windows = _fill(lengths[order], GROUPED_STEPS * options.tokens_per_step)
    for begin, end in windows:
        window = order[begin:end]
        order[begin:end] = window[np.argsort(lengths[window], kind="stable")]
    bounds = _fill(lengths[order], options.tokens_per_step)
    # Steps rise in length within a window, so their own order is shuffled over the epoch.
    steps = shuffled(len(bounds), seed=options.seed, epoch=epoch, purpose="steps")
    return EpochPlan(order, bounds[steps])


def _fill(lengths: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Cut a sequence into runs of at most `budget` tokens, each as long as possible, `[S, 2]`."""
    totals = np.cumsum(lengths)
    bounds = []
    begin = used = 0
    while begin < len(lengths):
        end = int(np.searchsorted(totals, used + budget, side="right"))
        bounds.append((begin, end))
        begin, used = end, int(totals[end - 1])
    return np.asarray(bounds, dtype=np.int64).reshape(-1, 2)


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute numbered documents over micro-batches of at most `budget` tokens.

    First fit, longest first, ties in the given order; all in one when they fit, in the given
    order. Deterministic.

    Returns:
        For each micro-batch the positions of its documents in `lengths`.
    """
    if sum(lengths) <= budget:
        return [list(range(len(lengths)))]
    batches: list[list[int]] = []
    free: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        length = lengths[position]
        place = next((at for at, room in enumerate(free) if room >= length), len(batches))
        if place == len(batches):
            batches.append([])
            free.append(budget)
        batches[place].append(position)
        free[place] -= length
    return batches


def require_fitting(dataset: Dataset, options: PackingOptions) -> None:
    """Check before the start that every document fits into a micro-batch and a step.

    Raises:
        DataError: One does not. Names the longest and both ways out.
    """
    origin, longest = dataset.longest()
    for name in ("micro_batch_tokens", "tokens_per_step"):
        budget = getattr(options, name)
        if longest > budget:
            count = int((dataset.lengths > budget).sum())
            raise DataError(
                f"{count} of {len(dataset)} documents do not fit training.{name} = {budget}; "
                f"the longest is {origin} with {longest} tokens",
                hint=f"Raise training.{name} to {longest}, or lower data.max_length to {budget} "
                "with data.overlong truncate or drop.",
            )

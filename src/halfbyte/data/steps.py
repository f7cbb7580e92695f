"""Steps without end, epoch after epoch, with a position that can be saved and taken up again."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from halfbyte.data.batch import Batch, build_batch
from halfbyte.data.dataset import Dataset
from halfbyte.data.packing import (
    EpochPlan,
    PackingOptions,
    pack,
    plan_epoch,
    require_fitting,
)
from halfbyte.errors import DataError, FormatError

State = Mapping[str, int | str]
"""Plain JSON. Numbers for the position and the options, text for the fingerprint."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The micro-batches of one optimizer step.

    Attributes:
        epoch: Counted from 0.
        index: In the epoch, from 0.
        num_steps: In the epoch.
        micro_batches: At least one.
    """

    epoch: int
    index: int
    num_steps: int
    micro_batches: tuple[Batch, ...]

    @property
    def num_tokens(self) -> int:
        """Of all micro-batches together."""
        return sum(batch.num_tokens for batch in self.micro_batches)

    @property
    def num_targets(self) -> int:
        """Of all micro-batches together: what the loss of the step is divided by."""
        return sum(batch.num_targets for batch in self.micro_batches)


class StepStream:
    """Iterates over steps. Every document comes exactly once an epoch.

    Args:
        dataset: What to train on.
        options: Budgets, seed, grouping.

    Raises:
        DataError: There is no document, or one does not fit the budgets.
    """

    def __init__(self, dataset: Dataset, options: PackingOptions) -> None:
        require_fitting(dataset, options)
        self._dataset = dataset
        self._options = options
        self._epoch = 0
        self._index = 0
        self._planned: tuple[int, EpochPlan] | None = None

    @classmethod
    def from_state(cls, dataset: Dataset, options: PackingOptions, state: State) -> "StepStream":
        """A stream that goes on behind the last step before `state()` was taken.

        Raises:
            DataError: Data or options are not those of the saved stream, so what follows
                could not be the same. Lists every difference.
            FormatError: The state is not one, or its position is beyond the epoch.
        """
        stream = cls(dataset, options)
        expected = stream.state()
        if state.keys() != expected.keys() or any(
            type(state[name]) is not type(value) for name, value in expected.items()
        ):
            raise FormatError(
                f"not a data position: {', '.join(expected)} expected, found {', '.join(state)}"
            )
        position = ("epoch", "index")
        if problems := [
            f"{name}: {state[name]} when saved, {value} here"
            for name, value in expected.items()
            if name not in position and state[name] != value
        ]:
            raise DataError(
                "cannot go on with this data position",
                problems=problems,
                hint="Resume with the data, tokenizer and settings of the run, or start a new one.",
            )
        stream._epoch, stream._index = (int(state[name]) for name in position)
        if stream._epoch < 0 or not 0 <= stream._index < stream.num_steps(stream._epoch):
            raise FormatError(
                f"data position: step {stream._index} of epoch {stream._epoch} does not exist"
            )
        return stream

    def state(self) -> dict[str, int | str]:
        """The position behind the last step, and what it depends on, as plain JSON."""
        options = {name: int(value) for name, value in asdict(self._options).items()}
        return {
            "epoch": self._epoch,
            "index": self._index,
            **options,
            "data": self._dataset.fingerprint,
        }

    def num_steps(self, epoch: int) -> int:
        """Steps of an epoch; orders differ, so may their numbers of steps."""
        return self._plan(epoch).num_steps

    def total_steps(self, num_epochs: int) -> int:
        """Steps of the first `num_epochs` epochs together."""
        return sum(self.num_steps(epoch) for epoch in range(num_epochs))

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        plan = self._plan(self._epoch)
        documents = plan.documents(self._index).tolist()
        lengths = self._dataset.lengths[documents].tolist()
        step = Step(
            self._epoch,
            self._index,
            plan.num_steps,
            tuple(
                build_batch(self._dataset, [documents[position] for position in positions])
                for positions in pack(lengths, self._options.micro_batch_tokens)
            ),
        )
        self._index += 1
        if self._index == plan.num_steps:
            self._epoch, self._index = self._epoch + 1, 0
        return step

    def _plan(self, epoch: int) -> EpochPlan:
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, plan_epoch(self._dataset.lengths, self._options, epoch)
        return self._planned[1]

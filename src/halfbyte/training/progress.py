"""What a run tells whoever watches it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

Record = Mapping[str, object]


class Observer(Protocol):
    """Told of every event of a run. What it does must not change the run."""

    def started(self, summary: Record) -> None:
        """The run begins or goes on: model, data, plan, steps."""

    def stepped(self, record: Record) -> None:
        """A step was taken: its record of `metrics.jsonl`."""

    def evaluated(self, record: Record) -> None:
        """An evaluation was made: its record of `metrics.jsonl`."""

    def sampled(self, records: Sequence[Record]) -> None:
        """Held-out prompts were continued: the records of `samples.jsonl`."""

    def noted(self, text: str) -> None:
        """Something worth a line: a checkpoint written, one passed over, a step left out."""


class Silent:
    """An observer that says nothing."""

    def started(self, summary: Record) -> None:
        """Say nothing."""

    def stepped(self, record: Record) -> None:
        """Say nothing."""

    def evaluated(self, record: Record) -> None:
        """Say nothing."""

    def sampled(self, records: Sequence[Record]) -> None:
        """Say nothing."""

    def noted(self, text: str) -> None:
        """Say nothing."""

"""Faults of a data set, collected so that all are shown at once.

A data set has many rows and often many faults of one kind. The first ones are listed with
their place; the rest are counted.
"""

from dataclasses import dataclass, field

from halfbyte.errors import DataError

DEFAULT_LIMIT = 20


class RowError(DataError):
    """One row cannot be used. Says what is wrong with it; the reader adds where it is."""


@dataclass(slots=True)
class Problems:
    """Collects faults; `raise_if_any` turns them into one error.

    Attributes:
        limit: How many are kept word by word.
        listed: The first `limit` faults, each with its place.
        count: How many were reported in all.
    """

    limit: int = DEFAULT_LIMIT
    listed: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, where: object, what: str) -> None:
        """Report one fault; `where` is printed before it, as in `train.jsonl:12`."""
        self.count += 1
        if len(self.listed) < self.limit:
            self.listed.append(f"{where}: {what}")

    def raise_if_any(self, message: str, *, hint: str = "") -> None:
        """Raise one `DataError` that lists the faults, unless there are none."""
        if self.count:
            raise DataError(message, problems=self.listed, num_problems=self.count, hint=hint)

"""What was found in a data set: its documents, and everything there is to say about them."""

from dataclasses import dataclass, field

from halfbyte.data.dataset import Dataset
from halfbyte.data.formats import FormatChoice
from halfbyte.data.options import DataOptions, Overlong
from halfbyte.data.problems import Problems
from halfbyte.data.sources import Sources

SHOWN = 5
"""Places named in a notice; the rest are counted."""


@dataclass(slots=True)
class Tally:
    """Rows to which something happened: all counted, the first ones named."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, what: object) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(str(what))

    def __str__(self) -> str:
        more = f" and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return ", ".join(self.first) + more


@dataclass(frozen=True, slots=True)
class Reading:
    """A data set as it was found.

    Attributes:
        options: How it was read.
        dataset: The documents that can be used.
        sources: The files.
        choice: The row format and why; None for plain text files or when none was found.
        ignored_fields: Fields of the rows that are not read.
        num_rows: Rows found, or plain text files; those with problems included.
        fingerprint: sha256 over the content of the rows in order, whatever the file kind.
        overlong: Rows of more than the maximum length (refused, truncated or dropped).
        num_lost_tokens: Tokens that truncating or dropping took away.
        cut: Texts of more than the maximum length, used whole in several documents.
        unseparated: Raw pairs with no space between prompt and completion.
        problems: What is wrong; training refuses a data set that has any.
    """

    options: DataOptions
    dataset: Dataset
    sources: Sources
    choice: FormatChoice | None
    ignored_fields: tuple[str, ...]
    num_rows: int
    fingerprint: str
    overlong: Tally
    num_lost_tokens: int
    cut: Tally
    unseparated: Tally
    problems: Problems

    def notices(self) -> list[str]:
        """What a user should know before training, a sentence each."""
        found = []
        limit = self.options.max_length
        if self.overlong.count and self.options.overlong is not Overlong.REFUSE:
            verb = "truncated" if self.options.overlong is Overlong.TRUNCATE else "dropped"
            found.append(
                f"{self.overlong.count} of {self.num_rows} rows are longer than {limit} tokens "
                f"and were {verb} ({self.num_lost_tokens} tokens lost): {self.overlong}"
            )
        if self.cut.count:
            found.append(
                f"{self.cut.count} of {self.num_rows} texts are longer than {limit} tokens "
                f"and were cut into several documents, with nothing lost: {self.cut}"
            )
        if self.unseparated.count:
            found.append(
                f"in {self.unseparated.count} of {self.num_rows} rows the prompt does not end, "
                "nor the completion begin, with a space or line break, so the two run together: "
                f"{self.unseparated}"
            )
        if self.ignored_fields:
            found.append(f"fields that are not used: {', '.join(self.ignored_fields)}")
        if self.sources.ignored:
            found.append(f"files of unknown kind, not read: {', '.join(self.sources.ignored)}")
        return found

"""Which of the field's row formats a data set is in, and why we think so.

A format is recognised by its field names alone. A row that fits two formats is an error that
names the setting which decides, because guessing would train on something else in silence.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from halfbyte.data.problems import Problems
from halfbyte.data.rows import Row
from halfbyte.errors import UsageError

FLAG = "data.format"


class Format(StrEnum):
    """Names of the formats, as in `data.format`."""

    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    PROMPT_COMPLETION = "prompt_completion"
    ALPACA = "alpaca"
    TEXT = "text"
    TOKENS = "tokens"


AUTO = "auto"
"""What stands for the format that the fields of the rows tell."""


def parse_format(name: str) -> Format | None:
    """The format of that name; None for `auto`.

    Raises:
        UsageError: There is none.
    """
    if name == AUTO:
        return None
    if name not in list(Format):
        raise UsageError(f"{FLAG}: one of {AUTO}, {', '.join(Format)} expected, found {name!r}")
    return Format(name)


MEANINGS = {
    Format.MESSAGES: "chat messages, through the model's chat template",
    Format.SHAREGPT: "ShareGPT turns, through the model's chat template",
    Format.PROMPT_COMPLETION: "raw prompt, completion, end token; no chat template",
    Format.ALPACA: "instruction and answer, through the model's chat template",
    Format.TEXT: "running text, cut at the maximum length",
    Format.TOKENS: "tokens made elsewhere, used as they are",
}

QUESTIONS_AND_ANSWERS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("input", "output"),
)

SIGNATURES: dict[Format, tuple[tuple[str, ...], ...]] = {
    Format.MESSAGES: (("messages",),),
    Format.SHAREGPT: (("conversations",),),
    Format.PROMPT_COMPLETION: QUESTIONS_AND_ANSWERS,
    Format.ALPACA: (("instruction", "output"), ("instruction", "response")),
    Format.TEXT: (("text",),),
    Format.TOKENS: (("input_ids",),),
}
"""Fields that a row must have to be in a format: any one of the alternatives, in full."""

OPTIONAL = {
    Format.MESSAGES: ("tools",),
    Format.SHAREGPT: ("system", "tools"),
    Format.PROMPT_COMPLETION: (),
    Format.ALPACA: ("input", "system", "history"),
    Format.TEXT: (),
    Format.TOKENS: ("labels", "attention_mask"),
}
"""Fields that are read besides; every other field is ignored and named."""


@dataclass(frozen=True, slots=True)
class FormatChoice:
    """A format with the fields that made it, and the reason in words."""

    format: Format
    fields: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.format} ({MEANINGS[self.format]}): {self.reason}"


def candidates(names: Collection[str]) -> list[FormatChoice]:
    """The formats that a row with these fields fits, at most one entry for each."""
    choices = [with_fields(format_, SIGNATURES[format_], names) for format_ in Format]
    found = [choice for choice in choices if choice]
    # `instruction, input, output` also holds the pair `input, output`.
    if any(choice.format is Format.ALPACA for choice in found):
        found = [choice for choice in found if choice.fields != ("input", "output")]
    return found


def with_fields(
    format_: Format, alternatives: Iterable[tuple[str, ...]], names: Collection[str]
) -> FormatChoice | None:
    """The choice of a format when these fields hold one of the alternatives."""
    for fields in alternatives:
        if all(name in names for name in fields):
            return FormatChoice(format_, fields, f"the rows have {_and(fields)}")
    return None


def signatures_when_asked(format_: Format) -> tuple[tuple[str, ...], ...]:
    """What suffices for a format that the user named: a template also wraps raw pairs."""
    if format_ is Format.ALPACA:
        return (*SIGNATURES[format_], *QUESTIONS_AND_ANSWERS)
    return SIGNATURES[format_]


class FormatDetector:
    """Settles the format at the first row and holds all others to it.

    Attributes:
        choice: The format; None until the first row was seen.
        ignored: Names of fields that are not read, in order of appearance.
    """

    def __init__(self, asked: Format | None, problems: Problems) -> None:
        self.choice: FormatChoice | None = None
        self.ignored: dict[str, None] = {}
        self._asked = asked
        self._problems = problems
        self._verdicts: dict[frozenset[str], FormatChoice | str] = {}
        self._first = ""

    def settle(self, rows: Iterable[Row]) -> Iterator[tuple[Row, FormatChoice]]:
        """Yield the rows that are in the format; report the others.

        Stops at the first row when that one does not settle the format.
        """
        for row in rows:
            names = frozenset(row.fields)
            verdict = self._verdicts.get(names) or self._judge(row.fields)
            self._verdicts[names] = verdict
            if isinstance(verdict, str):
                self._problems.add(row.origin, verdict)
                if self.choice is None:
                    return
                continue
            if self.choice is None:
                self.choice = verdict
                self._first = str(row.origin)
            yield row, verdict

    def _judge(self, names: Collection[str]) -> FormatChoice | str:
        found = self._as_asked(self._asked, names) if self._asked else self._detected(names)
        if isinstance(found, str):
            return found
        if self.choice and (found.format, found.fields) != (self.choice.format, self.choice.fields):
            return (
                f"mixed formats: {found.format} with {_and(found.fields)}, but the first row "
                f"({self._first}) is {self.choice.format} with {_and(self.choice.fields)}"
            )
        read = (*found.fields, *OPTIONAL[found.format])
        self.ignored.update(dict.fromkeys(name for name in names if name not in read))
        return found

    @staticmethod
    def _as_asked(format_: Format, names: Collection[str]) -> FormatChoice | str:
        alternatives = signatures_when_asked(format_)
        if found := with_fields(format_, alternatives, names):
            return FormatChoice(format_, found.fields, f"{FLAG} says so")
        return f"{_wanted(alternatives)} expected for {format_}, found {_and(names)}"

    def _detected(self, names: Collection[str]) -> FormatChoice | str:
        fitting = candidates(names)
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            formats = " and ".join(choice.format for choice in fitting)
            return f"fits {formats}: set {FLAG} to the one that is meant"
        if self.choice:
            return f"{_and(self.choice.fields)} expected as in {self._first}, found {_and(names)}"
        known = "; ".join(f"{_wanted(SIGNATURES[format_])} ({format_})" for format_ in Format)
        return f"no known format has the fields {_and(names)}; known: {known}"


def _wanted(alternatives: Iterable[tuple[str, ...]]) -> str:
    return " or ".join(" + ".join(fields) for fields in alternatives)


def _and(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"

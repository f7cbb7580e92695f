"""The words of an expression, each with its place, and faults that point at one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from halfbyte.errors import UsageError

MAX_LENGTH = 10_000
_EXCERPT = 72
"""Characters of a long expression that a message shows."""

_TOKEN = re.compile(
    r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<symbol>[-+*/>(),=])",
    re.ASCII,
)
_SPACE = re.compile(r"\s*")


class Kind(Enum):
    """What a token is."""

    NUMBER = "number"
    NAME = "name"
    SYMBOL = "symbol"
    END = "end"


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `begin` to `end` of an expression."""

    begin: int
    end: int

    def to(self, other: "Span") -> "Span":
        """From the beginning of this one to the end of the other."""
        return Span(self.begin, other.end)


@dataclass(frozen=True, slots=True)
class Token:
    """One word.

    Attributes:
        kind: What it is.
        text: As written; empty at the end.
        span: Where it is.
    """

    kind: Kind
    text: str
    span: Span


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, and where."""

    span: Span
    message: str


class SyntaxFault(Exception):  # noqa: N818  (becomes a UsageError with everything else)
    """A fault after which the rest of the expression cannot be understood."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(fault.message)


def tokenize(text: str) -> list[Token]:
    """All tokens, an end token last.

    Raises:
        SyntaxFault: A character belongs to no token, or the text is too long.
    """
    if len(text) > MAX_LENGTH:
        span = Span(MAX_LENGTH, MAX_LENGTH + 1)
        raise SyntaxFault(Fault(span, f"at most {MAX_LENGTH} characters expected"))
    tokens = []
    position = _skip_space(text, 0)
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            span = Span(position, position + 1)
            expected = "a name, a number or one of + - * / > ( ) , ="
            raise SyntaxFault(Fault(span, f"{expected} expected, found {text[position]!r}"))
        span = Span(match.start(), match.end())
        tokens.append(Token(Kind(match.lastgroup), match.group(), span))
        position = _skip_space(text, match.end())
    return [*tokens, Token(Kind.END, "", Span(len(text), len(text) + 1))]


def error_for(text: str, faults: Sequence[Fault]) -> UsageError:
    """One error that shows the place of every fault with a caret under it."""
    ordered = sorted(faults, key=lambda fault: (fault.span.begin, fault.span.end))
    return UsageError(
        "the expression cannot be used", problems=[_pointed_at(text, fault) for fault in ordered]
    )


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # noqa: S101  (it matches nothing, too)
    return match.end()


def _pointed_at(text: str, fault: Fault) -> str:
    begin = max(0, min(fault.span.begin - _EXCERPT // 2, len(text) - _EXCERPT))
    window = text[begin : begin + _EXCERPT]
    line = "".join(c if c.isprintable() else " " for c in window)
    before = "..." if begin else ""
    after = "..." if begin + _EXCERPT < len(text) else ""
    column = fault.span.begin - begin
    length = max(1, min(fault.span.end - begin, _EXCERPT) - column)
    carets = " " * (len(before) + column) + "^" * length
    return f"{before}{line}{after}\n  {carets} {fault.message}"

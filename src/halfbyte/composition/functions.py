"""The functions of an expression: what each takes, and what a call of one means."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from halfbyte.composition.expression import Dare, Node, Svd, Ties
from halfbyte.composition.tokens import Span

KEYWORDS: dict[str, tuple[str, ...]] = {
    "ties": ("density",),
    "dare": ("drop", "seed"),
    "svd": ("rank", "fidelity"),
}
"""Function -> the keywords it takes."""

DEFAULT_SEED = 0
_MAX_WHOLE = 2**53
"""Up to here, a float is the whole number that was written."""

Report = Callable[[Span, str], None]
"""Notes a fault at a place."""


@dataclass(frozen=True, slots=True)
class Keyword:
    """`name=value` in a call.

    Attributes:
        name: As written.
        name_span: Where the name is.
        value: None where it is no number; that has been reported.
        span: Where all of it is.
    """

    name: str
    name_span: Span
    value: float | None
    span: Span


@dataclass(frozen=True, slots=True)
class Call:
    """A function as it is called.

    Attributes:
        name: As written.
        span: Of the name.
        parts: The adapters it is given.
        keywords: In order.
    """

    name: str
    span: Span
    parts: tuple[Node, ...]
    keywords: tuple[Keyword, ...]


def build(call: Call, report: Report) -> Node | None:
    """The node of a call, or None when it means nothing; what is wrong is reported."""
    if call.name not in KEYWORDS:
        report(call.span, f"no function {call.name!r}. There are: {', '.join(KEYWORDS)}.")
        return None
    if not call.parts:
        report(call.span, f"{call.name} of no adapter")
    values = _checked_keywords(call, report)
    if not call.parts or values is None:
        return None
    if call.name == "ties":
        return Ties(call.parts, _fraction(call, values, "density", report, above=0))
    if call.name == "dare":
        drop = _fraction(call, values, "drop", report, below=1)
        seed = _whole(values["seed"], report, lowest=0) if "seed" in values else DEFAULT_SEED
        return Dare(call.parts, drop, seed)
    return _svd(call, values, report)


def _svd(call: Call, values: Mapping[str, Keyword], report: Report) -> Svd | None:
    if len(call.parts) > 1:
        report(call.span, f"svd takes one expression, found {len(call.parts)}")
    if len(values) != 1:
        report(call.span, "svd needs one of rank=... and fidelity=...")
        return None
    if "rank" in values:
        return Svd(call.parts[0], rank=_whole(values["rank"], report, lowest=1))
    return Svd(call.parts[0], fidelity=_fraction(call, values, "fidelity", report, above=0))


def _checked_keywords(call: Call, report: Report) -> dict[str, Keyword] | None:
    """Keywords by name, or None when one of them is wrong."""
    found: dict[str, Keyword] = {}
    sound = True
    allowed = KEYWORDS[call.name]
    for keyword in call.keywords:
        if keyword.name not in allowed:
            message = f"{call.name} takes {', '.join(allowed)}, not {keyword.name!r}"
            report(keyword.name_span, message)
        elif keyword.name in found:
            report(keyword.name_span, f"{keyword.name} is given twice")
        elif keyword.value is not None:
            found[keyword.name] = keyword
            continue
        sound = False
    return found if sound else None


def _fraction(
    call: Call,
    values: Mapping[str, Keyword],
    name: str,
    report: Report,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """A number from 0 to 1; `above` and `below` are excluded."""
    if name not in values:
        report(call.span, f"{call.name} needs {name}=...")
        return 1.0
    value = values[name].value or 0.0
    if not (0 <= value <= 1 and above < value < below):
        low = "above 0" if above == 0 else "at least 0"
        high = "below 1" if below == 1 else "at most 1"
        report(values[name].span, f"{name}: {low} and {high} expected, found {value:g}")
    return value


def _whole(keyword: Keyword, report: Report, *, lowest: int) -> int:
    value = keyword.value or 0.0
    if value != int(value) or not lowest <= value <= _MAX_WHOLE:
        expected = f"a whole number from {lowest} to 2^53"
        report(keyword.span, f"{keyword.name}: {expected} expected, found {value:g}")
        return lowest
    return int(value)

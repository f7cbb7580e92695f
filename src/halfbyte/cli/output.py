"""Where a command's words go.

Without `--json`, results are text on stdout. With it, stdout carries JSON only (an object, or one a
line), and the same text goes to stderr. Notes and progress are on stderr always.
"""

import contextlib
import contextvars
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from halfbyte.errors import HalfbyteError

JsonValue = None | bool | int | float | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_RED, _BOLD, _PLAIN = "\033[31m", "\033[1m", "\033[0m"


@dataclass(frozen=True, slots=True)
class Output:
    """Prints for one command.

    Attributes:
        json: Whether stdout carries JSON.
    """

    json: bool = False

    def text(self, text: str = "", *, styled: bool = False) -> None:
        """Print a line, or several, for a person.

        Args:
            text: May come from files of strangers: control characters are shown, not obeyed.
            styled: Whether the text is our own and holds escape codes for colours.
        """
        print(text if styled else printable(text), file=sys.stderr if self.json else sys.stdout)

    def heading(self, text: str) -> None:
        """Print the title of a section, bold on a terminal."""
        stream = sys.stderr if self.json else sys.stdout
        text = printable(text)
        self.text(_styled(text, _BOLD) if _in_colour(stream) else text, styled=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print aligned columns; numbers, and text that begins with a digit, to the right."""
        self.text(format_table(columns, rows))

    def emit(self, record: Mapping[str, JsonValue]) -> None:
        """Print one JSON object on one line of stdout; nothing without `--json`."""
        if self.json:
            print(json.dumps(_finite(record), ensure_ascii=False), flush=True)  # noqa: T201

    def note(self, text: str) -> None:
        """Print a line on stderr: a warning, or what is going on."""
        print(printable(text), file=sys.stderr)  # noqa: T201

    def error(self, error: HalfbyteError) -> int:
        """Print an error and return its exit code."""
        prefix = _styled("error:", _RED) if _in_colour(sys.stderr) else "error:"
        print(f"{prefix} {printable(str(error))}", file=sys.stderr)  # noqa: T201
        self.emit(
            {
                "error": {
                    "code": error.code,
                    "message": error.message,
                    "problems": error.problems,
                    "hint": error.hint,
                    "exit_code": error.exit_code,
                }
            }
        )
        return error.exit_code

    def flush(self) -> None:
        """Write what is buffered, so that a closed pipe shows here and not at exit."""
        sys.stdout.flush()


_current: contextvars.ContextVar[Output] = contextvars.ContextVar("output")


def current_output() -> Output:
    """The output of the command that runs; plain text outside of one."""
    return _current.get(Output())


@contextlib.contextmanager
def use_output(output: Output) -> Iterator[None]:
    """Make `current_output` return `output` inside the block."""
    token = _current.set(output)
    try:
        yield
    finally:
        _current.reset(token)


def printable(text: str) -> str:
    r"""The text with control characters written out (`\x1b`): a terminal would obey them."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def format_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest entry, two spaces apart."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    right = [
        bool(cells) and all(cell[:1].isdigit() or cell[:1] in {"-", ""} for cell in column)
        for column in zip(*cells, strict=True)
    ] or [False] * len(columns)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [columns, *cells]
    )


def format_bytes(count: float) -> str:
    """Bytes in the binary unit that leaves one to three digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:  # noqa: PLR2004
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _finite(value: JsonValue) -> JsonValue:
    """JSON has no NaN and no infinity: null says that there is no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def _styled(text: str, style: str) -> str:
    return f"{style}{text}{_PLAIN}"


def _in_colour(stream: object) -> bool:
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and isatty() and "NO_COLOR" not in os.environ

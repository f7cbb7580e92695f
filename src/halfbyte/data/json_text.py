"""Strict JSON, read value by value, with the line of each.

The standard parser builds a whole document at once. Walking over the top level by hand keeps
one row in memory, and gives every row a line to name in messages.
"""

import json
import re
from collections.abc import Iterator

from halfbyte.errors import FormatError


class BadLineError(FormatError):
    """A line of a file cannot be read.

    Attributes:
        line: Its number, from 1.
    """

    def __init__(self, line: int, message: str) -> None:
        self.line = line
        super().__init__(message)


def describe(value: object) -> str:
    """Say what kind of JSON value this is."""
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a whole number",
        float: "a fraction",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def parse_json(text: str) -> object:
    """Parse one value that fills the text.

    Raises:
        FormatError: It is not JSON (NaN and Infinity are not), or nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:
        raise FormatError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise FormatError("JSON nested too deeply") from error


def json_rows(text: str) -> Iterator[tuple[int, object]]:
    """Yield the rows of a JSON file, each with its line.

    The rows are the elements of an array, or of the one list in an object.

    Raises:
        BadLineError: The text is not JSON from here on, or not of this shape.
    """
    walk = _Walk(text)
    first = walk.skip_space()
    if first == "[":
        yield from walk.elements()
    elif first == "{":
        yield from walk.only_list_of_object()
    else:
        found = repr(first) if first else "an empty file"
        raise BadLineError(
            walk.line(),
            f"an array of rows, or an object with a list of them expected, found {found}",
        )
    if trailing := walk.skip_space():
        raise BadLineError(walk.line(), f"not JSON: {trailing!r} after the end")


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_SPACE = re.compile(r"[ \t\r\n]*")


class _Walk:
    """A position in JSON text that moves on value by value and knows its line."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._counted_to = 0
        self._line = 1

    def line(self) -> int:
        self._line += self._text.count("\n", self._counted_to, self._position)
        self._counted_to = self._position
        return self._line

    def skip_space(self) -> str:
        """Move to the next character that is not space and return it, or "" at the end."""
        if match := _SPACE.match(self._text, self._position):
            self._position = match.end()
        return self._text[self._position : self._position + 1]

    def expect(self, characters: str) -> str:
        found = self.skip_space()
        if not found or found not in characters:
            wanted = " or ".join(repr(character) for character in characters)
            shown = repr(found) if found else "the end of the file"
            raise BadLineError(self.line(), f"not JSON: {wanted} expected, found {shown}")
        self._position += 1
        return found

    def value(self) -> object:
        self.skip_space()
        line = self.line()
        try:
            value, self._position = _DECODER.raw_decode(self._text, self._position)
        except json.JSONDecodeError as error:
            raise BadLineError(
                error.lineno, f"not JSON: {error.msg} at column {error.colno}"
            ) from error
        except ValueError as error:
            raise BadLineError(line, f"not JSON: {error}") from error
        except RecursionError as error:
            raise BadLineError(line, "JSON nested too deeply") from error
        return value

    def elements(self) -> Iterator[tuple[int, object]]:
        self.expect("[")
        if self.skip_space() == "]":
            self._position += 1
            return
        while True:
            self.skip_space()
            line = self.line()
            yield line, self.value()
            if self.expect(",]") == "]":
                return

    def only_list_of_object(self) -> Iterator[tuple[int, object]]:
        self.expect("{")
        lists = []
        while self.skip_space() != "}":
            key = self.value()
            self.expect(":")
            if self.skip_space() != "[":
                self.value()
            else:
                lists.append(str(key))
                yield from self.elements()
            if self.expect(",}") == "}":
                break
        if len(lists) != 1:
            found = f"lists {', '.join(lists)}" if lists else "no list"
            raise BadLineError(1, f"an object with one list of rows expected, found {found}")

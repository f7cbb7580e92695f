"""Strict JSON from files that others wrote: bounded size, count and depth, no key twice."""

import json
import re
from pathlib import Path

from halfbyte.errors import FormatError
from halfbyte.storage.files import open_regular, read_exactly

MAX_BYTES = 16 << 20
MAX_VALUES = 1 << 20
MAX_DEPTH = 64

# Possessive, so that no input makes the matcher remember where it could turn back.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'
_STRUCTURE = re.compile(_STRING + rb"|[\[\]{}]", re.DOTALL)


def read_json_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, object]:
    """The JSON object in a file.

    Raises:
        MissingFileError, StorageError, UnsafeArtifactError: See `open_regular`.
        FormatError: See `parse_json_object`; also a file of more than `max_bytes`.
    """
    with open_regular(path) as (descriptor, status):
        if status.st_size > max_bytes:
            raise FormatError(
                f"{path}: at most {max_bytes} bytes of JSON expected, found {status.st_size}"
            )
        raw = read_exactly(descriptor, status.st_size, 0, path)
    return parse_json_object(raw, str(path))


def parse_json_object(raw: bytes, source: str) -> dict[str, object]:
    """A JSON object, parsed without trust.

    Args:
        raw: UTF-8 text.
        source: Where it came from, for messages.

    Raises:
        FormatError: Not UTF-8, not JSON, not an object, NaN or infinity, a key twice in one
            object, nested deeper than 64, or more than 2^20 values.
    """
    _require_modest(raw, source)
    duplicates: list[str] = []

    def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            duplicates.extend(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return result

    try:
        parsed = json.loads(
            raw.decode(), object_pairs_hook=collect, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise FormatError(f"{source}: not UTF-8: {error.reason} at byte {error.start}") from error
    except ValueError as error:
        raise FormatError(f"{source}: not JSON: {error}") from error
    if duplicates:
        raise FormatError(
            f"{source}: a key may appear once in an object",
            problems=[f"{key!r} appears again" for key in duplicates[:20]],
        )
    if not isinstance(parsed, dict):
        raise FormatError(f"{source}: a JSON object expected, found {type(parsed).__name__}")
    return parsed


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _require_modest(raw: bytes, source: str) -> None:
    if (count := raw.count(b",")) > MAX_VALUES:
        raise FormatError(f"{source}: at most {MAX_VALUES} values expected, found about {count}")
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _STRUCTURE.finditer(raw):
        token = match.group()
        if token in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise FormatError(
                    f"{source}: nested deeper than {MAX_DEPTH} at byte {match.start()}"
                )
        elif token in b"]}":
            depth -= 1

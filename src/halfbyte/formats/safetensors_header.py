"""The header of a safetensors file, parsed without trust.

A file is 8 bytes (the header's length, little-endian), the header, the data. The header is a JSON
object: tensor name -> dtype, shape and the range of its bytes within the data; an optional
`__metadata__` holds text. The general JSON parser never sees the header, only single entries of a
bounded length without nesting, so that neither depth nor number of values can cost memory.

Source: https://github.com/huggingface/safetensors (format section of its README).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

MAX_HEADER_BYTES = 100_000_000
MAX_ENTRIES = 50_000
MAX_ENTRY_BYTES = 4096
MAX_DIMENSIONS = 64
MAX_COUNT = 2**63 - 1
"""What a dimension, or the bytes of a tensor, can be at most in torch."""
MAX_PROBLEMS = 20
METADATA = "__metadata__"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Name in files -> dtype, in the library's order: it writes tensors from the last to the first."""

# Possessive throughout: no input makes the matcher remember where it could turn back.
_SPACE = rb"[ \t\r\n]*+"
_STRING = rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"'
_KEY = re.compile(_SPACE + b"(" + _STRING + b")" + _SPACE + b":" + _SPACE)
_TEXT = re.compile(b"(" + _STRING + b")")
_ENTRY = re.compile(
    rb'(\{(?:[^{}\[\]"]++|' + _STRING + rb'|\[(?:[^{}\[\]"]++|' + _STRING + rb")*+\])*+\})"
)
_OPEN = re.compile(_SPACE + rb"\{" + _SPACE)
_CLOSE = re.compile(_SPACE + rb"\}")
_NEXT = re.compile(_SPACE + b"," + _SPACE)
_REST = re.compile(_SPACE + rb"\Z")
_PAIRS = json.JSONDecoder(object_pairs_hook=list)


class HeaderFault(ValueError):  # noqa: N818  (becomes a FormatError once the file is known)
    """A fault after which nothing more can be read."""


class _TooManyEntries(HeaderFault):
    """Refused without a look at any entry: that many would take a second."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: bytes `begin` to `end` of the file, counted from its start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says, and everything that is wrong with it.

    Attributes:
        entries: By name, in order of position.
        metadata: The text under `__metadata__`.
        problems: One line a fault; the rest is meaningless unless it is empty.
    """

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    problems: tuple[str, ...]


def header_length_fault(length: int, file_size: int) -> str | None:
    """Why no header of that length can be in a file of that size, or None."""
    if length > MAX_HEADER_BYTES:
        return f"header: at most {MAX_HEADER_BYTES} bytes expected, the file claims {length}"
    if length > file_size - 8:
        return f"header: {length} bytes claimed, {file_size - 8} follow in the file"
    if length < len("{}"):
        return f"header: at least 2 bytes expected, the file claims {length}"
    return None


def parse_header(raw: bytes, file_size: int) -> Header:
    """Everything that a header says, checked against the size of the file.

    Args:
        raw: The header, without the 8 bytes before it.
        file_size: Bytes of the whole file.
    """
    problems: list[str] = []
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    data_begin = 8 + len(raw)
    seen: set[str] = set()
    members, fault = _members(raw)
    for name, value in members:
        if name in seen:
            problems.append(f"{name!r}: appears more than once")
        seen.add(name)
        if isinstance(value, list):
            metadata = _metadata(value, problems)
            continue
        entry = _entry(name, value, data_begin, file_size - data_begin, problems)
        if entry is not None:
            entries[name] = entry
    if fault is not None:
        problems.append(f"header: {fault}")
    if not problems:  # positions of faulty entries would only repeat their faults
        entries = dict(sorted(entries.items(), key=lambda i: (i[1].begin, i[1].end)))
        problems += _layout_problems(entries, data_begin, file_size)
    return Header(entries, metadata, tuple(shortened(problems)))


def shortened(problems: list[str]) -> list[str]:
    """The first problems, and how many more there are: a hostile file can have a million."""
    if len(problems) <= MAX_PROBLEMS:
        return problems
    return [*problems[:MAX_PROBLEMS], f"and {len(problems) - MAX_PROBLEMS} more"]


_Member = tuple[str, bytes | list[tuple[str, str]]]


def _members(raw: bytes) -> tuple[list[_Member], HeaderFault | None]:
    """What `_top_level` finds, and the fault that ended it; nothing where there are too many."""
    members: list[_Member] = []
    try:
        members.extend(_top_level(raw))
    except _TooManyEntries as fault:
        return [], fault
    except HeaderFault as fault:
        return members, fault
    return members, None


def _top_level(raw: bytes) -> Iterator[_Member]:
    """Names with the text of their entries; `__metadata__` with its pairs."""
    # Counted first: what is refused below at the latest is then refused at once.
    if raw.count(b'"data_offsets"') > MAX_ENTRIES:
        raise _TooManyEntries(f"more than {MAX_ENTRIES} tensors")
    position = _match(_OPEN, raw, 0, "'{'").end()
    end = _CLOSE.match(raw, position)
    num_entries = 0
    while not end:
        if num_entries == MAX_ENTRIES:
            raise _TooManyEntries(f"more than {MAX_ENTRIES} tensors")
        num_entries += 1
        name, position = _string(_KEY, raw, position, "a name and ':'")
        if name == METADATA:
            pairs, position = _text_pairs(raw, position)
            yield name, pairs
        else:
            entry = _ENTRY.match(raw, position, position + MAX_ENTRY_BYTES)
            if not entry:
                raise HeaderFault(
                    f"{name!r}: an object of dtype, shape and data_offsets, without nesting and "
                    f"of at most {MAX_ENTRY_BYTES} bytes, expected at byte {position}, "
                    f"found {_excerpt(raw, position)}"
                )
            yield name, entry.group()
            position = entry.end()
        end = _CLOSE.match(raw, position)
        if not end:
            position = _match(_NEXT, raw, position, "',' or '}'").end()
    _match(_REST, raw, end.end(), "nothing but spaces after the object")


def _text_pairs(raw: bytes, position: int) -> tuple[list[tuple[str, str]], int]:
    pairs: list[tuple[str, str]] = []
    position = _match(_OPEN, raw, position, f"{METADATA}: an object of texts").end()
    end = _CLOSE.match(raw, position)
    while not end:
        if len(pairs) == MAX_ENTRIES:
            raise HeaderFault(f"{METADATA}: more than {MAX_ENTRIES} texts")
        key, position = _string(_KEY, raw, position, f"{METADATA}: a key and ':'")
        text, position = _string(_TEXT, raw, position, f"{METADATA}: {key!r}: a text")
        pairs.append((key, text))
        end = _CLOSE.match(raw, position)
        if not end:
            position = _match(_NEXT, raw, position, f"{METADATA}: ',' or '}}'").end()
    return pairs, end.end()


def _match(pattern: re.Pattern[bytes], raw: bytes, position: int, expected: str) -> re.Match[bytes]:
    match = pattern.match(raw, position)
    if not match:
        raise HeaderFault(
            f"{expected} expected at byte {position}, found {_excerpt(raw, position)}"
        )
    return match


def _string(
    pattern: re.Pattern[bytes], raw: bytes, position: int, expected: str
) -> tuple[str, int]:
    match = _match(pattern, raw, position, expected)
    quoted = match[1]
    try:
        if b"\\" in quoted:
            text: str = json.loads(quoted)
            text.encode()  # a lone surrogate, written as an escape, is no text either
        else:
            text = quoted[1:-1].decode()
    except UnicodeError:
        raise HeaderFault(
            f"UTF-8 expected at byte {position}, found {_excerpt(raw, position)}"
        ) from None
    except ValueError:
        raise HeaderFault(
            f"a JSON string expected at byte {position}, found {_excerpt(raw, position)}"
        ) from None
    return text, match.end()


def _excerpt(raw: bytes, position: int) -> str:
    return repr(raw[position : position + 24]) if position < len(raw) else "its end"


def _metadata(pairs: list[tuple[str, str]], problems: list[str]) -> dict[str, str]:
    result: dict[str, str] = {}
    for key, text in pairs:
        if key in result:
            problems.append(f"{METADATA}: {key!r} appears more than once")
        result[key] = text
    return result


def _entry(
    name: str, text: bytes, data_begin: int, data_size: int, problems: list[str]
) -> TensorEntry | None:
    """The entry, or None after adding what is wrong with it to `problems`."""
    try:
        pairs = _PAIRS.decode(text.decode())
    except ValueError as error:  # malformed, not UTF-8, or a number of thousands of digits
        problems.append(f"{name!r}: not JSON: {error}")
        return None
    fields = dict(pairs)
    if len(fields) < len(pairs) or set(fields) != {"dtype", "shape", "data_offsets"}:
        found = ", ".join(repr(key) for key, _ in pairs[:5]) or "nothing"
        problems.append(
            f"{name!r}: dtype, shape and data_offsets, once each, expected; {found} found"
        )
        return None
    faults: list[str] = []
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        faults.append(f"dtype: one of {', '.join(DTYPES)} expected, found {_value(dtype)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        faults.append(
            f"shape: a list of at most {MAX_DIMENSIONS} whole numbers from 0 to 2^63 - 1 expected, "
            f"found {_value(shape)}"
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:  # noqa: PLR2004
        faults.append(
            f"data_offsets: begin and end, whole numbers, begin <= end, expected, "
            f"found {_value(offsets)}"
        )
    elif offsets[1] > data_size:
        faults.append(f"data_offsets: end {offsets[1]} is beyond the {data_size} bytes of data")
    if not faults:
        faults += _size_faults(DTYPES[dtype], shape, offsets)
    if faults:
        problems += [f"{name!r}: {fault}" for fault in faults]
        return None
    begin, end = offsets
    return TensorEntry(name, DTYPES[dtype], tuple(shape), data_begin + begin, data_begin + end)


def _are_counts(value: object) -> bool:
    # By type, not isinstance: JSON's true is an int to isinstance.
    if not isinstance(value, list):
        return False
    for count in value:  # noqa: SIM110  (a generator costs as much as the rest of an entry)
        if type(count) is not int or not 0 <= count <= MAX_COUNT:
            return False
    return True


def _size_faults(dtype: torch.dtype, shape: list[int], offsets: list[int]) -> Iterator[str]:
    # Strides are products of all dimensions but zeros, and must not overflow either.
    if math.prod(d for d in shape if d) * dtype.itemsize > MAX_COUNT:
        yield f"shape: {shape} needs more than 2^63 - 1 bytes"
        return
    needed, found = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if needed != found:
        yield f"data_offsets: {needed} bytes expected for its dtype and shape, found {found}"


def _value(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."  # noqa: PLR2004


def _layout_problems(
    entries: Mapping[str, TensorEntry], data_begin: int, file_size: int
) -> Iterator[str]:
    """Overlaps, holes and a wrong end; `entries` are in order of position."""
    position, before = data_begin, "the header"
    for entry in entries.values():
        if entry.begin > position:
            yield f"{entry.name!r}: a hole of {entry.begin - position} bytes after {before}"
        elif entry.begin < position:
            yield f"{entry.name!r}: overlaps {before} by {position - entry.begin} bytes"
        position, before = max(position, entry.end), repr(entry.name)
    if position != file_size:
        yield f"{file_size - position} bytes follow the last tensor: the file should end there"

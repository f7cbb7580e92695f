"""The header of a GGUF file, parsed without trust.

A file is the magic `GGUF`, version, number of tensors, number of metadata pairs; the pairs (key,
type, value); the tensor infos (name, dimensions, type, offset); padding to the alignment; the
data. All numbers are little-endian, strings a 64-bit length and UTF-8. Every length is compared
with what the file still holds before anything of that size is made, and the sums are limited.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (the format's definition).
"""

import math
import struct
from dataclasses import dataclass, field

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

VERSIONS = (2, 3)
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY_BYTES = (1 << 16) - 1
MAX_METADATA_BYTES = 256 << 20
MAX_ELEMENTS = 1 << 21
"""Of all arrays together; the largest vocabularies have three arrays of 2^18."""
MAX_NAME_BYTES = 256
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
MAX_PROBLEMS = 20
DEFAULT_ALIGNMENT = 32

SUPPORTED = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K",
    "Q5_K",
    "Q6_K",
)
"""Tensor types that can be read."""

Scalar = int | float | bool | str
Value = Scalar | list[Scalar]

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class BrokenHeaderError(Exception):
    """Nothing behind this point can be understood."""


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """One tensor of the file.

    Attributes:
        type_name: How its elements are stored: `Q4_K`.
        shape: Rows first, as torch has it; the file has the reverse.
        begin: First byte in the file.
        end: One behind the last byte.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(slots=True)
class Header:
    """What the header says, and what is wrong with it."""

    version: int = 0
    metadata: dict[str, Value] = field(default_factory=dict)
    entries: dict[str, GgufEntry] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    type_number: int
    shape: tuple[int, ...]
    offset: int


class _Cursor:
    """Reads forward, never beyond the end."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.position = 0
        self.elements = 0

    @property
    def left(self) -> int:
        return len(self.buffer) - self.position

    def take(self, size: int, what: str) -> memoryview:
        if size > self.left:
            raise BrokenHeaderError(
                f"{what}: {size} bytes at {self.position} expected, the file has {self.left} more"
            )
        begin = self.position
        self.position += size
        return self.buffer[begin : self.position]

    def scalar(self, form: struct.Struct, what: str) -> int | float | bool:
        value: int | float | bool = form.unpack(self.take(form.size, what))[0]
        return value

    def u32(self, what: str) -> int:
        return int(self.scalar(_U32, what))

    def u64(self, what: str) -> int:
        return int(self.scalar(_U64, what))

    def string(self, what: str, limit: int = MAX_METADATA_BYTES) -> str:
        length = self.u64(what)
        if length > limit:
            raise BrokenHeaderError(f"{what}: at most {limit} bytes expected, found {length}")
        raw = self.take(length, what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise BrokenHeaderError(f"{what}: not UTF-8 at its byte {error.start}") from None

    def value(self, kind: int, what: str) -> Value:
        if kind == _ARRAY:
            return self._array(what)
        return self._plain(kind, what)

    def _plain(self, kind: int, what: str) -> Scalar:
        if kind == _STRING:
            return self.string(what)
        if kind not in _SCALARS:
            raise BrokenHeaderError(f"{what}: unknown type {kind}")
        return self.scalar(_SCALARS[kind], what)

    def _array(self, what: str) -> list[Scalar]:
        kind, count = self.u32(what), self.u64(what)
        if kind == _ARRAY:
            raise BrokenHeaderError(f"{what}: an array of arrays, which no model needs")
        self.elements += count
        smallest = _SCALARS[kind].size if kind in _SCALARS else _U64.size
        if count * smallest > self.left or self.elements > MAX_ELEMENTS:
            raise BrokenHeaderError(
                f"{what}: an array of {count} elements; {self.left} bytes are left, and all arrays "
                f"together may have {MAX_ELEMENTS} elements"
            )
        if kind in _SCALARS:
            form = struct.Struct(f"<{count}{_SCALARS[kind].format[1:]}")
            return list(form.unpack(self.take(form.size, what)))
        return [self._plain(kind, what) for _ in range(count)]


def parse_header(buffer: memoryview) -> Header:
    """Read and check everything that comes before the data.

    Args:
        buffer: The whole file.

    Returns:
        What was understood; `problems` is empty for a valid file.
    """
    header, cursor = Header(), _Cursor(buffer)
    try:
        num_tensors, num_pairs = _read_start(cursor, header)
        for i in range(num_pairs):
            _read_pair(cursor, header, i)
        infos = [_read_info(cursor, i) for i in range(num_tensors)]
    except BrokenHeaderError as error:
        header.problems.append(str(error))
        return header
    alignment = header.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        isinstance(alignment, bool)
        or not isinstance(alignment, int)
        or not 0 < alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        header.problems.append(
            f"general.alignment: a power of two up to {MAX_ALIGNMENT} expected, "
            f"found {alignment!r:.40}"
        )
        return header
    data = -(-cursor.position // alignment) * alignment
    for info in infos:
        _place(info, data, alignment, len(buffer), header)
    _find_overlaps(header)
    return header


def _read_start(cursor: _Cursor, header: Header) -> tuple[int, int]:
    magic = bytes(cursor.take(4, "magic"))
    if magic != b"GGUF":
        raise BrokenHeaderError(f"magic: b'GGUF' expected, found {magic!r}")
    header.version = cursor.u32("version")
    if header.version not in VERSIONS:
        swapped = int.from_bytes(header.version.to_bytes(4, "little"), "big")
        kind = " (a big-endian file)" if swapped in VERSIONS else ""
        raise BrokenHeaderError(
            f"version: {' or '.join(map(str, VERSIONS))} expected, found {header.version}{kind}"
        )
    num_tensors, num_pairs = cursor.u64("number of tensors"), cursor.u64("number of pairs")
    for count, limit, what in (
        (num_tensors, MAX_TENSORS, "tensors"),
        (num_pairs, MAX_PAIRS, "metadata pairs"),
    ):
        if count > limit:
            raise BrokenHeaderError(f"{what}: at most {limit} expected, found {count}")
    return num_tensors, num_pairs


def _read_pair(cursor: _Cursor, header: Header, i: int) -> None:
    key = cursor.string(f"key of pair {i}", MAX_KEY_BYTES)
    what = f"metadata {key!r:.80}"
    value = cursor.value(cursor.u32(what), what)
    if key in header.metadata:
        header.problems.append(f"{what}: appears again")
    header.metadata[key] = value
    if cursor.position > MAX_METADATA_BYTES:
        raise BrokenHeaderError(f"metadata: at most {MAX_METADATA_BYTES} bytes expected")


def _read_info(cursor: _Cursor, i: int) -> _Info:
    name = cursor.string(f"name of tensor {i}", MAX_NAME_BYTES)
    num_dimensions = cursor.u32(name)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise BrokenHeaderError(
            f"{name!r}: 1 to {MAX_DIMENSIONS} dimensions expected, found {num_dimensions}"
        )
    shape = tuple(cursor.u64(name) for _ in range(num_dimensions))[::-1]
    return _Info(name, cursor.u32(name), shape, cursor.u64(name))


def _place(info: _Info, data: int, alignment: int, size: int, header: Header) -> None:
    """Add the tensor to the entries, or say why it cannot be."""
    name, shape = info.name, info.shape
    try:
        kind = GGMLQuantizationType(info.type_number)
    except ValueError:
        header.problems.append(f"{name!r}: unknown type {info.type_number}")
        return
    if kind.name not in SUPPORTED:
        header.problems.append(
            f"{name!r}: type {kind.name} cannot be read; {', '.join(SUPPORTED)} can"
        )
        return
    block, block_bytes = GGML_QUANT_SIZES[kind]
    num_elements = math.prod(shape)
    nbytes = num_elements // block * block_bytes
    begin = data + info.offset
    if name in header.entries:
        header.problems.append(f"{name!r}: appears again")
    elif not num_elements:
        header.problems.append(f"{name!r}: shape {list(shape)} has no elements")
    elif shape[-1] % block:
        header.problems.append(
            f"{name!r}: rows of a multiple of {block} elements expected for {kind.name}, "
            f"found {shape[-1]}"
        )
    elif info.offset % alignment:
        header.problems.append(f"{name!r}: offset {info.offset} is not a multiple of {alignment}")
    elif begin + nbytes > size:
        header.problems.append(
            f"{name!r}: {nbytes} bytes at {begin} expected, the file has {size} bytes"
        )
    else:
        header.entries[name] = GgufEntry(name, kind.name, shape, begin, begin + nbytes)


def _find_overlaps(header: Header) -> None:
    last: GgufEntry | None = None
    for entry in sorted(header.entries.values(), key=lambda e: (e.begin, e.end)):
        if last is not None and entry.begin < last.end:
            header.problems.append(f"{entry.name!r}: overlaps {last.name!r}")
        if last is None or entry.end > last.end:
            last = entry

"""Reading 4-bit weights that bitsandbytes, or we, wrote: strict, with all faults at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.checks import (
    FLOAT_DTYPES,
    MIN_BLOCK_SIZE,
    block_size_fault,
    describe,
    dtype_name,
    nonfinite_fault,
)
from halfbyte.formats.codebooks import (
    DYNAMIC_MAP,
    FOUR_BIT_CODEBOOKS,
    FP4,
    INT4_AFFINE,
    NF4,
    Codebook,
)
from halfbyte.formats.double_quantization import DoubleQuantized
from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.formats.safetensors_header import MAX_DIMENSIONS
from halfbyte.formats.safetensors_writer import MAX_LATE_BYTES
from halfbyte.storage.json_file import parse_json_object

PARTS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "zero_points",
    "nested_zero_points",
)
"""The last component of the names of a weight's parts, but for its state."""

STATE = ".quant_state."
STATE_NAMES = {
    book.name: f"{'bitsandbytes' if book in (NF4, FP4) else 'halfbyte'}__{book.name}"
    for book in FOUR_BIT_CODEBOOKS.values()
}
"""Codebook -> the last component of the name of the JSON part."""

MAX_ELEMENTS = 2**60
"""Far beyond any memory, and far below where the products of sizes overflow."""

_DTYPES = {dtype_name(dtype): dtype for dtype in FLOAT_DTYPES}
# What bitsandbytes calls `quant_storage`: the same bytes under another dtype.
_STORAGE_DTYPES = (
    torch.uint8,
    torch.int8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
_MAX_FLOAT32 = torch.finfo(torch.float32).max
_FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_NESTED_AFFINE_FIELDS = {*_NESTED_FIELDS, "nested_zero_points_offset"}


@dataclass(frozen=True, slots=True)
class WeightState:
    """The JSON part of a 4-bit weight, checked.

    Attributes:
        codebook: What its codes stand for.
        block_size: Elements that share a scale.
        dtype: Of the weight that was quantized.
        shape: Of that weight.
        nested_block_size: Scales that share a second-level scale; None without double quantization.
        offset: Added to decoded scales.
        zero_points_offset: Added to decoded zero-points.
    """

    codebook: Codebook
    block_size: int
    dtype: torch.dtype
    shape: torch.Size
    nested_block_size: int | None
    offset: float
    zero_points_offset: float


def from_bitsandbytes(name: str, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """A 4-bit weight from its parts; its codes and scales are those tensors, not copies.

    Args:
        name: Of the weight; its parts are `name.absmax` and so on.
        tensors: The parts, and any others, such as the whole checkpoint.

    Returns:
        Decodes to bitsandbytes' bits.

    Raises:
        FormatError: A part is missing, of a wrong dtype or shape, not what its state says, or
            holds a NaN or an infinity; or the codebook is not the one that the state names. All
            faults of the state, else all of the tensors, are listed.
    """
    keys = {f"{name}{STATE}{state}": book for book, state in STATE_NAMES.items()}
    found = [key for key in keys if key in tensors]
    if len(found) != 1:
        raise FormatError(
            f"{name}: one part quant_state of {', '.join(STATE_NAMES.values())} expected, "
            f"found {len(found)}"
        )
    state = read_state(found[0], tensors[found[0]], FOUR_BIT_CODEBOOKS[keys[found[0]]])
    return _Parts(name, tensors, state).read()


def read_state(key: str, packed: Tensor, book: Codebook) -> WeightState:
    """How a weight is quantized, from its JSON part.

    Args:
        key: The part's name, for messages.
        packed: uint8, its bytes.
        book: What the name says that the codes stand for.

    Raises:
        FormatError: It is not such a description; all faults are listed.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() > MAX_LATE_BYTES:
        raise FormatError(
            f"{key}: uint8 [at most {MAX_LATE_BYTES}] expected, found {describe(packed)}"
        )
    fields = parse_json_object(bytes(packed.tolist()), key)
    nested = not _NESTED_AFFINE_FIELDS.isdisjoint(fields)
    expected = set(_FIELDS)
    if nested:
        expected |= _NESTED_AFFINE_FIELDS if book == INT4_AFFINE else _NESTED_FIELDS
    problems = [f"{field}: missing" for field in sorted(expected - set(fields))]
    problems += [f"{field!r:.60}: not expected" for field in sorted(set(fields) - expected)]
    if problems:
        raise FormatError(f"{key} does not describe a 4-bit weight", problems=problems)
    if fields["quant_type"] != book.name:
        problems.append(f"quant_type: {book.name!r} expected, found {fields['quant_type']!r:.60}")
    block_size = _block_size(fields, "blocksize", problems)
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        problems.append(f"dtype: one of {', '.join(_DTYPES)} expected, found {dtype!r:.60}")
    shape = _shape(fields["shape"], problems)
    nested_block_size, offset, zero_points_offset = None, 0.0, 0.0
    if nested:
        nested_block_size = _block_size(fields, "nested_blocksize", problems)
        if fields["nested_dtype"] != "float32":
            found = fields["nested_dtype"]
            problems.append(f"nested_dtype: 'float32' expected, found {found!r:.60}")
        offset = _float32(fields, "nested_offset", problems)
        if book == INT4_AFFINE:
            zero_points_offset = _float32(fields, "nested_zero_points_offset", problems)
    if problems:
        raise FormatError(f"{key} does not describe a 4-bit weight", problems=problems)
    return WeightState(
        book,
        block_size,
        _DTYPES[str(dtype)],
        shape,
        nested_block_size,
        offset,
        zero_points_offset,
    )


def _block_size(fields: Mapping[str, object], name: str, problems: list[str]) -> int:
    value = fields[name]
    if not isinstance(value, int) or block_size_fault(value):
        problems.append(f"{name}: a power of two from 32 to 4096 expected, found {value!r:.60}")
        return MIN_BLOCK_SIZE
    return value


def _shape(value: object, problems: list[str]) -> torch.Size:
    # By type, not isinstance: JSON's true is an int to isinstance.
    if (
        not isinstance(value, list)
        or len(value) > MAX_DIMENSIONS
        or not all(type(size) is int and size >= 0 for size in value)
        or math.prod(size for size in value if size) > MAX_ELEMENTS
    ):
        problems.append(
            f"shape: a list of at most {MAX_DIMENSIONS} whole numbers and 2^60 elements expected, "
            f"found {value!r:.60}"
        )
        return torch.Size()
    return torch.Size(value)


def _float32(fields: Mapping[str, object], name: str, problems: list[str]) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _MAX_FLOAT32:
        problems.append(f"{name}: a number within float32 expected, found {value!r:.60}")
        return 0.0
    return torch.tensor(value, dtype=torch.float32).item()


class _Parts:
    """The tensors of one weight, checked one by one; faults are collected."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], state: WeightState) -> None:
        self.name = name
        self.tensors = tensors
        self.state = state
        self.problems: list[str] = []
        self.expected: set[str] = set()

    def read(self) -> QuantizedTensor:
        codes = self.codes()
        table = self.tensor("quant_map", torch.float32, len(self.state.codebook.values))
        if table is not None and table.tolist() != self.state.codebook.table().tolist():
            self.problems.append(
                f"quant_map: the values of {self.state.codebook.name} expected, found others; "
                "bitsandbytes ignores them, and decodes with those that the name says"
            )
        nested_map = self.nested_map()
        scales = self.block_vector("absmax", self.state.offset, nested_map)
        zero_points = None
        if self.state.codebook == INT4_AFFINE:
            offset = self.state.zero_points_offset
            zero_points = self.block_vector("zero_points", offset, nested_map)
        self.problems += [
            f"{part}: not expected by its state"
            for part in PARTS
            if part not in self.expected and f"{self.name}.{part}" in self.tensors
        ]
        if self.problems or codes is None or scales is None:
            raise FormatError(f"{self.name} is not a 4-bit weight", problems=self.problems)
        state = self.state
        return QuantizedTensor(
            codes, scales, state.codebook, state.block_size, state.shape, state.dtype, zero_points
        )

    def codes(self) -> Tensor | None:
        """uint8 `[ceil(N / 2)]`; the file may store the same bytes as another dtype."""
        if self.name not in self.tensors:
            self.problems.append("its codes are missing")
            return None
        codes = self.tensors[self.name]
        num_bytes = (self.state.shape.numel() + 1) // 2
        size = codes.dtype.itemsize
        if (
            codes.dtype not in _STORAGE_DTYPES
            or tuple(codes.shape) != (num_bytes // size, 1)
            or num_bytes % size
        ):
            self.problems.append(
                f"codes: uint8 [{num_bytes}, 1] expected for shape {list(self.state.shape)}, "
                f"found {describe(codes)}"
            )
            return None
        return codes.reshape(-1).view(torch.uint8)

    def tensor(self, part: str, dtype: torch.dtype, count: int) -> Tensor | None:
        self.expected.add(part)
        tensor = self.tensors.get(f"{self.name}.{part}")
        if tensor is None:
            self.problems.append(f"{part}: missing")
        elif tensor.dtype != dtype or tuple(tensor.shape) != (count,):
            self.problems.append(
                f"{part}: {dtype_name(dtype)} [{count}] expected, found {describe(tensor)}"
            )
        elif dtype.is_floating_point and not torch.isfinite(tensor).all():
            self.problems.append(nonfinite_fault(tensor, part))
        else:
            return tensor
        return None

    def nested_map(self) -> Codebook:
        """The file's own second-level map: versions of torch round its entries differently."""
        if self.state.nested_block_size is None:
            return DYNAMIC_MAP
        table = self.tensor("nested_quant_map", torch.float32, len(DYNAMIC_MAP.values))
        if table is None or table.tolist() == DYNAMIC_MAP.table().tolist():
            return DYNAMIC_MAP
        return Codebook("of the file", tuple(table.tolist()))

    def block_vector(
        self, part: str, offset: float, nested_map: Codebook
    ) -> Tensor | DoubleQuantized | None:
        num_blocks = -(-self.state.shape.numel() // self.state.block_size)
        nested_block_size = self.state.nested_block_size
        if nested_block_size is None:
            return self.tensor(part, torch.float32, num_blocks)
        codes = self.tensor(part, torch.uint8, num_blocks)
        num_nested = -(-num_blocks // nested_block_size)
        scales = self.tensor(f"nested_{part}", torch.float32, num_nested)
        if codes is None or scales is None:
            return None
        return DoubleQuantized(codes, scales, offset, nested_block_size, nested_map)

"""What a checkpoint holds, from headers alone: each tensor, and each 4-bit weight as one.

Nothing is loaded but the few hundred bytes of JSON that describe a 4-bit weight.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from halfbyte.errors import FormatError
from halfbyte.formats.bitsandbytes_layout import part_specs, quantized_names
from halfbyte.formats.bitsandbytes_reading import STATE, STATE_NAMES, WeightState, read_state
from halfbyte.formats.checks import dtype_name
from halfbyte.formats.codebooks import FOUR_BIT_CODEBOOKS, INT4_AFFINE, Codebook
from halfbyte.formats.safetensors_file import SafetensorsFile, TensorEntry
from halfbyte.formats.safetensors_writer import MAX_LATE_BYTES, TensorSpec

NESTED_VECTORS = (".nested_absmax", ".nested_zero_points")

Contents = Mapping[str, tuple[SafetensorsFile, TensorEntry]]
"""Tensor -> the file that holds it, and where; `Shards` is one."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, or all parts of a 4-bit weight.

    Attributes:
        name: In the file.
        stored: Codebook or dtype: `nf4`, `bfloat16`.
        shape: Of the weight that it stands for.
        num_elements: Of that weight.
        nbytes: All its parts.
        state: How a 4-bit weight is quantized; None for any other tensor.
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    num_elements: int
    nbytes: int
    state: WeightState | None = None

    @property
    def double_quantized(self) -> bool:
        """Whether it is a 4-bit weight with 8-bit scales."""
        return self.state is not None and self.state.nested_block_size is not None

    def to_json(self) -> dict[str, str | int | list[int]]:
        """Name, storage, shape and bytes."""
        return {
            "name": self.name,
            "stored": self.stored,
            "shape": list(self.shape),
            "num_elements": self.num_elements,
            "bytes": self.nbytes,
        }


def list_stored_tensors(contents: Contents) -> list[StoredTensor]:
    """Every tensor in the order of its name.

    Raises:
        FormatError: The parts of a 4-bit weight do not belong together or are not described.
    """
    weights = quantized_names(contents)
    parts: dict[str, list[str]] = {weight: [] for weight in weights}
    found = []
    for name, (_, entry) in contents.items():
        weight = _weight_of(name, weights)
        if weight is not None:
            parts[weight].append(name)
            continue
        shape = tuple(entry.shape)
        stored = dtype_name(entry.dtype)
        found.append(StoredTensor(name, stored, shape, math.prod(shape), entry.nbytes))
    found += [_four_bit(weight, names, contents) for weight, names in parts.items()]
    return sorted(found, key=lambda tensor: tensor.name)


def format_bits(tensors: Iterable[StoredTensor]) -> float:
    """Bits a parameter of 4-bit weights: codes, scales, zero-points and offsets as defined.

    The tables and the description that a file repeats with each weight are left out.
    """
    num_bytes = num_elements = 0
    for tensor in tensors:
        if tensor.state is not None:
            num_bytes += _defined_bytes(tensor.state)
            num_elements += tensor.num_elements
    return 8 * num_bytes / num_elements if num_elements else 0.0


def _defined_bytes(state: WeightState) -> int:
    num_blocks = -(-state.shape.numel() // state.block_size)
    vectors = 2 if state.codebook == INT4_AFFINE else 1
    if state.nested_block_size is None:
        vector = 4 * num_blocks
    else:
        vector = num_blocks + 4 * -(-num_blocks // state.nested_block_size) + 4
    return (state.shape.numel() + 1) // 2 + vectors * vector


def _weight_of(name: str, weights: set[str]) -> str | None:
    """The 4-bit weight that a tensor is (a part of), if any."""
    if name in weights:
        return name
    before_state = name.partition(STATE)[0]
    if before_state != name and before_state in weights:
        return before_state
    stem = name.rpartition(".")[0]
    return stem if stem in weights else None


def _four_bit(weight: str, parts: Sequence[str], contents: Contents) -> StoredTensor:
    key = next(name for name in parts if STATE in name)
    books = {state: FOUR_BIT_CODEBOOKS[book] for book, state in STATE_NAMES.items()}
    state = _read_state(key, *contents[key], books[key.partition(STATE)[2]])
    _require_parts(weight, parts, contents, state)
    return StoredTensor(
        name=weight,
        stored=state.codebook.name,
        shape=tuple(state.shape),
        num_elements=state.shape.numel(),
        nbytes=sum(contents[name][1].nbytes for name in parts),
        state=state,
    )


def _read_state(key: str, file: SafetensorsFile, entry: TensorEntry, book: Codebook) -> WeightState:
    if entry.nbytes > MAX_LATE_BYTES:  # before it is read
        raise FormatError(f"{key}: at most {MAX_LATE_BYTES} bytes expected, found {entry.nbytes}")
    return read_state(key, file.read(key), book)


def _require_parts(
    weight: str, parts: Sequence[str], contents: Contents, state: WeightState
) -> None:
    """Raise unless the headers of a weight's parts are those that its state asks for."""
    nested_block_size = state.nested_block_size
    specs, key = part_specs(
        weight,
        state.shape,
        state.codebook,
        block_size=state.block_size,
        double_quant=nested_block_size is not None,
    )
    if nested_block_size is not None:  # other writers may choose another than ours
        num_blocks = -(-state.shape.numel() // state.block_size)
        shape = (-(-num_blocks // nested_block_size),)
        for name in specs:
            if name.endswith(NESTED_VECTORS):
                specs[name] = TensorSpec(torch.float32, shape)
    problems = [f"{name}: missing" for name in specs if name not in contents]
    problems += [f"{name}: not expected" for name in parts if name not in specs and name != key]
    for name, spec in specs.items():
        if name not in contents:
            continue
        entry = contents[name][1]
        # The codes may be stored as another dtype: the same bytes.
        if entry.nbytes != spec.nbytes or (name != weight and entry.dtype != spec.dtype):
            problems.append(
                f"{name}: {dtype_name(spec.dtype)} of {spec.nbytes} bytes expected, found "
                f"{dtype_name(entry.dtype)} of {entry.nbytes}"
            )
    if problems:
        raise FormatError(f"{weight} is not a 4-bit weight", problems=problems)

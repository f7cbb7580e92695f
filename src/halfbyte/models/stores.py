"""Stores for the weights of a model directory: mapped from its files, or copied to memory."""

import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.bitsandbytes_layout import from_bitsandbytes, quantized_names
from halfbyte.formats.checks import FLOAT_DTYPES, dtype_name
from halfbyte.formats.double_quantization import DoubleQuantized
from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.formats.safetensors_header import TensorEntry, shortened
from halfbyte.formats.shards import MappedShards, Shards
from halfbyte.layers.weights import ResidentStore, Weight, WeightRef
from halfbyte.models.layout import EMBEDDINGS, HEAD, Layout

IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".self_attn.masked_bias")
"""Constants that old checkpoints store; they follow from the config."""


class MappedStore:
    """Weights over the pages of the directory's files, which processes share.

    Attributes:
        shards: What is mapped.
    """

    permanent = True

    def __init__(self, mapped: MappedShards, weights: Mapping[str, "MappedWeight"]) -> None:
        self.shards = mapped.shards
        self._mapped = mapped
        self._weights = {name: weight.value for name, weight in weights.items()}
        self._parts = {name: weight.parts for name, weight in weights.items()}
        self._of_layer: dict[int, list[str]] = {}
        for weight in weights.values():
            self._of_layer.setdefault(weight.layer, []).extend(weight.parts)
        self._wanted = set(self._of_layer)

    def acquire(self, ref: WeightRef) -> Weight:
        """The weight, over the file's pages."""
        return self._weights[ref.name]

    def release(self, ref: WeightRef) -> None:
        """The pages stay mapped; the system drops them when memory is short."""

    def announce(self, layer: int) -> None:
        """Let the system read the layer's pages ahead, the first time."""
        if layer in self._wanted:
            self._wanted.remove(layer)
            self._advise(self._of_layer[layer], mmap.MADV_WILLNEED)

    def size(self, name: str) -> int:
        """Bytes that a weight takes in the files."""
        return sum(self.shards[part][1].nbytes for part in self._parts[name])

    def forget(self, name: str) -> None:
        """Give the pages of a weight back; whoever reads it again has them read again."""
        self._advise(self._parts[name], mmap.MADV_DONTNEED)

    def forget_layer(self, layer: int) -> None:
        """Give the pages of all weights of a layer back."""
        self._advise(self._of_layer[layer], mmap.MADV_DONTNEED)

    def _advise(self, parts: Iterable[str], advice: int) -> None:
        for part in parts:
            self._mapped.home(part).advise(part, advice)

    def resident(self, dtype: torch.dtype) -> ResidentStore:
        """A copy in memory; linears that are not in 4 bits, and embeddings, in `dtype`."""
        return ResidentStore({name: _copy(w, dtype) for name, w in self._weights.items()})


@dataclass(frozen=True, slots=True)
class MappedWeight:
    """A weight over mapped pages.

    Attributes:
        value: The weight.
        layer: Of its handle.
        parts: Tensors in the files that it is made of.
    """

    value: Weight
    layer: int
    parts: tuple[str, ...]


def open_mapped(shards: Shards, layout: Layout) -> MappedStore:
    """Map a directory whose tensors are exactly those of `layout`.

    Raises:
        FormatError: Tensors are missing, left over, of a wrong shape or dtype, or not what their
            4-bit state says; all are listed.
    """
    owners = _owners(shards)
    problems = _misfits(shards, layout, owners)
    mapped = shards.map()
    weights: dict[str, MappedWeight] = {}
    for ref in layout.refs():
        if ref.name in owners:
            parts = owners[ref.name]
            try:
                value: Weight = from_bitsandbytes(ref.name, _Tensors(mapped, parts))
            except FormatError as error:
                problems += [f"{error.message}: {p}" for p in error.problems] or [error.message]
                continue
            if tuple(value.shape) != ref.shape:
                problems.append(_shape_fault(ref, tuple(value.shape)))
        elif ref.name in shards:
            parts = (ref.name,)
            value = mapped.tensor(ref.name)
        else:
            continue
        weights[ref.name] = MappedWeight(value, ref.layer, parts)
    if problems:
        raise FormatError(
            f"{shards.directory} does not hold the tensors that its config.json describes",
            problems=shortened(problems),
            hint="The download is incomplete, or config.json belongs to another model.",
        )
    return MappedStore(mapped, weights)


def _owners(shards: Shards) -> dict[str, tuple[str, ...]]:
    """The 4-bit weights of a directory, each with the names of its parts."""
    owners: dict[str, list[str]] = {name: [] for name in quantized_names(shards)}
    for name in shards:
        for owner in (name, name.rpartition(".")[0], name.partition(".quant_state.")[0]):
            if owner in owners:
                owners[owner].append(name)
                break
    return {owner: tuple(parts) for owner, parts in owners.items()}


def _misfits(shards: Shards, layout: Layout, owners: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Missing and left-over tensors, and plain ones of a wrong shape or dtype."""
    refs = {ref.name: ref for ref in layout.refs()}
    linears = {f"{path}.weight" for path in layout.linear_paths()} | {HEAD}
    of_quantized = {part for parts in owners.values() for part in parts}
    problems = [f"{name}: missing" for name in refs if name not in shards]
    for name in owners:
        if name not in refs:
            problems.append(f"{name}: not a tensor of this model")
        elif name not in linears:
            problems.append(f"{name}: only linear layers can be in 4 bits")
    for name in shards:
        if name in of_quantized:
            continue
        if name in refs:
            problems += _plain_faults(refs[name], shards[name][1])
        elif not name.endswith(IGNORED_SUFFIXES) and not _is_tied_head(name, layout):
            problems.append(f"{name}: not a tensor of this model")
    return problems


def _plain_faults(ref: WeightRef, entry: TensorEntry) -> Iterator[str]:
    if tuple(entry.shape) != ref.shape:
        yield _shape_fault(ref, tuple(entry.shape))
    if entry.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(dtype_name(d) for d in FLOAT_DTYPES)
        yield f"{ref.name}: one of {allowed} expected, found {dtype_name(entry.dtype)}"


def _shape_fault(ref: WeightRef, found: tuple[int, ...]) -> str:
    return f"{ref.name}: shape {list(ref.shape)} expected, found {list(found)}"


def _is_tied_head(name: str, layout: Layout) -> bool:
    """Files may repeat the embeddings as the head; the config says that they are one."""
    return name == HEAD and layout.head.name == EMBEDDINGS


class _Tensors(Mapping[str, Tensor]):
    """The parts of one weight, mapped when asked for."""

    def __init__(self, mapped: MappedShards, names: tuple[str, ...]) -> None:
        self._mapped = mapped
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._mapped.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _copy(weight: Weight, dtype: torch.dtype) -> Weight:
    if isinstance(weight, QuantizedTensor):
        zero_points = weight.stored_zero_points
        return replace(
            weight,
            codes=weight.codes.clone(),
            stored_scales=_clone(weight.stored_scales),
            stored_zero_points=None if zero_points is None else _clone(zero_points),
        )
    # Vectors (norms, biases) keep their dtype: norms are used in float32.
    if weight.dim() == 1 or weight.dtype == dtype:
        return weight.clone()
    return weight.to(dtype)


def _clone(stored: Tensor | DoubleQuantized) -> Tensor | DoubleQuantized:
    if isinstance(stored, DoubleQuantized):
        return replace(stored, codes=stored.codes.clone(), scales=stored.scales.clone())
    return stored.clone()

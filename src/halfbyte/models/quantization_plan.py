"""What quantizing or merging a model will write, byte by byte, before anything is read.

Which weights become 4-bit follows from the family's layout: the projections inside decoder
layers. Embeddings, head, norms and biases stay in 16 bits.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from halfbyte.errors import FormatError, UsageError
from halfbyte.formats.bitsandbytes_layout import part_specs
from halfbyte.formats.checks import require_block_size
from halfbyte.formats.codebooks import FOUR_BIT_CODEBOOKS, Codebook
from halfbyte.formats.safetensors_writer import TensorSpec
from halfbyte.formats.shards import DEFAULT_SHARD_BYTES, plan_shards, shard_file_names
from halfbyte.models.config import parse_config
from halfbyte.models.layout import HEAD, layout_of
from halfbyte.models.sources import Source

MAX_PROBLEMS = 20
_STATE_BYTES = 256
"""An upper bound for the JSON of one weight; its length depends on how numbers print."""
_HEADER_BYTES = 160
"""An upper bound for one entry of a header or index beside the name."""

# Buffers that old checkpoints hold; every reader computes them.
_BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.masked_bias)")


@dataclass(frozen=True, slots=True)
class Quantizer:
    """How weights are quantized. Valid once built.

    Attributes:
        codebook: A name of `FOUR_BIT_CODEBOOKS`.
        block_size: Elements per scale.
        double_quant: Whether scales are stored in 8 bits.
        keep: Patterns (`*`, `?`) of tensor or module names that stay in 16 bits.

    Raises:
        UsageError: A codebook that is not known.
        FormatError: A block size that is not allowed.
    """

    codebook: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_block_size(self.block_size)
        if self.codebook not in FOUR_BIT_CODEBOOKS:
            known = ", ".join(FOUR_BIT_CODEBOOKS)
            raise UsageError(f"codebook: one of {known} expected, found {self.codebook!r}")

    @property
    def book(self) -> Codebook:
        """The codebook itself."""
        return FOUR_BIT_CODEBOOKS[self.codebook]


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of the source and what becomes of it.

    Attributes:
        name: As in files.
        quantized: Whether it becomes 4-bit.
        specs: The tensors to write for it.
        late: The tensor of it whose length is not known before.
    """

    name: str
    quantized: bool
    specs: Mapping[str, TensorSpec]
    late: str | None

    @property
    def nbytes(self) -> int:
        """What it takes in a shard, at most."""
        return sum(spec.nbytes for spec in self.specs.values()) + (_STATE_BYTES if self.late else 0)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write."""

    name: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will be written.

    Attributes:
        shards: Files and their tensors; over all of them in the order of names.
        kept_modules: Linear modules inside decoder layers that do not become 4-bit.
        ignored: Tensors of the source that the model does not need.
        num_bytes: Upper bound of what the weights take on disk, within a percent.
    """

    shards: tuple[Shard, ...]
    kept_modules: tuple[str, ...]
    ignored: tuple[str, ...]
    num_bytes: int

    @property
    def items(self) -> tuple[Item, ...]:
        """All tensors in the order of writing."""
        return tuple(item for shard in self.shards for item in shard.items)


def plan_quantization(
    source: Source, quantizer: Quantizer, *, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Plan:
    """`plan_weights` for quantizing: what stays in 16 bits keeps the model's dtype."""
    return plan_weights(source, quantizer, kept_dtype(source), shard_bytes=shard_bytes)


def plan_weights(
    source: Source,
    quantizer: Quantizer | None,
    dtype: torch.dtype,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Plan:
    """Compare the source with its config and lay out the result.

    Args:
        source: The model.
        quantizer: How the weights of decoder layers are quantized; None leaves them in `dtype`.
        dtype: Of every tensor that does not become 4-bit.
        shard_bytes: What one file may hold.

    Raises:
        UnsupportedError: An unknown family.
        FormatError: Tensors are missing, unknown or of a wrong shape; all are listed.
        UsageError: A pattern of `keep` matches nothing.
    """
    name = source.description["name"]
    config = parse_config(source.config, source.generation_config, where=f"{name}: config.json")
    layout = layout_of(config)
    expected = {ref.name: ref.shape for ref in layout.refs()}
    ignored = _check(expected, source.tensors.shapes, name, tied=config.tied)
    linears = [f"{path}.weight" for path in layout.linear_paths()]
    kept = set(linears) if quantizer is None else _kept(linears, expected, quantizer.keep)
    # In the order of their UTF-8 bytes, in which the fingerprint takes them.
    items = [
        _plain_item(tensor, expected[tensor], dtype)
        if quantizer is None or tensor in kept or tensor not in linears
        else _four_bit_item(tensor, expected[tensor], quantizer)
        for tensor in sorted(expected, key=str.encode)
    ]
    by_name = {item.name: item for item in items}
    groups = plan_shards(({item.name: item.nbytes} for item in items), max_bytes=shard_bytes)
    names = shard_file_names(len(groups))
    shards = tuple(
        Shard(file, tuple(by_name[tensor] for tensor in group))
        for file, group in zip(names, groups, strict=True)
    )
    num_entries = sum(len(item.specs) + 1 for item in items)
    longest = max(map(len, expected)) + 40
    modules = sorted(tensor.removesuffix(".weight") for tensor in kept)
    return Plan(
        shards,
        tuple(modules),
        ignored,
        sum(item.nbytes for item in items) + num_entries * (longest + _HEADER_BYTES),
    )


def kept_dtype(source: Source) -> torch.dtype:
    """What stays is float16 where the model says so, else bfloat16."""
    stated = source.config.get("dtype", source.config.get("torch_dtype"))
    return torch.float16 if stated == "float16" else torch.bfloat16


def _plain_item(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Item:
    return Item(name, False, {name: TensorSpec(dtype, shape)}, None)


def _four_bit_item(name: str, shape: tuple[int, ...], quantizer: Quantizer) -> Item:
    specs, late = part_specs(
        name,
        shape,
        quantizer.book,
        block_size=quantizer.block_size,
        double_quant=quantizer.double_quant,
    )
    return Item(name, True, specs, late)


def _check(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    name: str,
    *,
    tied: bool,
) -> tuple[str, ...]:
    """Names that may be left out; raises where the checkpoint is not this model."""
    problems = [f"{tensor}: missing" for tensor in expected if tensor not in found]
    problems += [
        f"{tensor}: shape {list(shape)} expected, found {list(found[tensor])}"
        for tensor, shape in expected.items()
        if tensor in found and found[tensor] != shape
    ]
    extra = [tensor for tensor in found if tensor not in expected]
    ignored = [t for t in extra if _BUFFERS.fullmatch(t) or (tied and t == HEAD)]
    problems += [f"{t!r:.120}: not a tensor of this model" for t in extra if t not in ignored]
    if problems:
        raise FormatError(
            f"{name}: the tensors are not those that config.json describes",
            problems=_shortened(problems),
            hint="The download is incomplete, or config.json belongs to another model.",
        )
    return tuple(ignored)


def _kept(linears: Sequence[str], names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    names = list(names)
    kept: set[str] = set()
    problems = []
    for pattern in patterns:
        matched = [
            name
            for name in names
            if fnmatch.fnmatchcase(name, pattern)
            or fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern)
        ]
        if not matched:
            problems.append(f"{pattern!r} matches no tensor")
        kept.update(matched)
    if problems:
        raise UsageError(
            "keep",
            problems=problems,
            hint=f"Names look like {linears[0]}; try '*.down_proj' or 'model.layers.0.*'.",
        )
    return kept & set(linears)


def _shortened(problems: list[str]) -> list[str]:
    more = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], f"and {more} more"] if more > 0 else problems

"""Small things that explaining any directory needs: JSON beside the tensors, words for numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from halfbyte.cli.output import JsonValue, format_bytes
from halfbyte.formats.stored_tensors import StoredTensor, format_bits
from halfbyte.storage.json_file import read_json_object

LARGEST_COUNT = 2**63
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def read_optional_json(path: Path) -> dict[str, object] | None:
    """The object in a JSON file, or None where there is no such file."""
    return read_json_object(path) if path.exists() else None


def text_of(values: Mapping[str, object], key: str) -> str | None:
    """A text that a JSON file holds under `key`, cut to what fits on a line; None if it is not."""
    value = values.get(key)
    return value[:200] if isinstance(value, str) and value else None


def count_of(values: Mapping[str, object], key: str) -> int | None:
    """A whole number that a JSON file holds under `key`, or None."""
    value = values.get(key)
    return value if type(value) is int and abs(value) < LARGEST_COUNT else None


def number_of(values: Mapping[str, object], key: str) -> float | None:
    """A number that a JSON file holds under `key`, or None."""
    value = values.get(key)
    return value if isinstance(value, float) else count_of(values, key)


def describe_storage(tensors: Sequence[StoredTensor]) -> str:
    """How many parameters are stored as what: `nf4: 106,168,320 in 52.4 MiB; bfloat16: ...`."""
    elements, sizes = Counter[str](), Counter[str]()
    for tensor in tensors:
        elements[tensor.stored] += tensor.num_elements
        sizes[tensor.stored] += tensor.nbytes
    return "; ".join(
        f"{stored}: {elements[stored]:,} in {format_bytes(size)}"
        for stored, size in sizes.most_common()
    )


def storage_record(tensors: Sequence[StoredTensor]) -> dict[str, JsonValue]:
    """The same for machines."""
    record: dict[str, JsonValue] = {}
    for stored in sorted({tensor.stored for tensor in tensors}):
        group = [tensor for tensor in tensors if tensor.stored == stored]
        record[stored] = {
            "tensors": len(group),
            "num_elements": sum(tensor.num_elements for tensor in group),
            "bytes": sum(tensor.nbytes for tensor in group),
        }
    return record


def describe_quantization(tensors: Sequence[StoredTensor]) -> str:
    """Codebook, block size and bits of the 4-bit weights: a phrase for each kind there is."""
    groups: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        if tensor.state is not None:
            nested = tensor.state.nested_block_size
            scales = "32-bit scales" if nested is None else f"8-bit scales in blocks of {nested}"
            phrase = f"{tensor.stored.upper()} in blocks of {tensor.state.block_size}, {scales}"
            groups.setdefault(phrase, []).append(tensor)
    return "; ".join(
        f"{phrase}: {len(group)} weights, {format_bits(group):.3f} bits a parameter"
        for phrase, group in groups.items()
    )


def quantization_record(tensors: Sequence[StoredTensor]) -> JsonValue:
    """The same for machines; None without 4-bit weights."""
    weights = [tensor for tensor in tensors if tensor.state is not None]
    if not weights:
        return None
    return {
        "codebooks": sorted({tensor.stored for tensor in weights}),
        "block_sizes": sorted({t.state.block_size for t in weights if t.state is not None}),
        "double_quantized": all(tensor.double_quantized for tensor in weights),
        "weights": len(weights),
        "num_elements": sum(tensor.num_elements for tensor in weights),
        "bytes": sum(tensor.nbytes for tensor in weights),
        "bits_per_element": format_bits(weights),
    }


PROVENANCE_FILES = ("provenance.json", "halfbyte.json")
"""What `train` and `quantize` leave beside their results."""


def describe_provenance(directory: Path) -> tuple[str, JsonValue]:
    """What the files of provenance say, on a line and for machines.

    Values are cut to 100 characters, and the config of a run is left out.
    """
    found = {name: read_optional_json(directory / name) for name in PROVENANCE_FILES}
    names = [name for name, content in found.items() if content is not None]
    if not names:
        return f"unknown: there is no {' or '.join(PROVENANCE_FILES)}", None
    record: dict[str, JsonValue] = {}
    for content in found.values():
        for key, value in (content or {}).items():
            if key != "config":
                record |= _flattened(f"{key:.40}", value)
    phrases = [f"{key} {value}" for key, value in record.items()]
    return "; ".join(phrases) or f"{' and '.join(names)} says nothing", record


def _flattened(key: str, value: object) -> dict[str, JsonValue]:
    if isinstance(value, dict):
        return {f"{key}.{name:.40}": _shortened(below) for name, below in value.items()}
    return {key: _shortened(value)}


def pickle_doubts(directory: Path) -> list[str]:
    """A sentence about files whose formats can run code."""
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if not pickles:
        return []
    names = ", ".join(pickles[:5]) + (", ..." if len(pickles) > 5 else "")  # noqa: PLR2004
    return [f"{names}: not looked at, because opening a pickle runs code"]


def _shortened(value: object) -> str:
    return str(value)[:100] if isinstance(value, str | int | float) else type(value).__name__

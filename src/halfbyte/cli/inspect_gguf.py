"""Explaining a GGUF file from its header."""

import math
from pathlib import Path

from halfbyte.cli.inspect_files import describe_storage, storage_record
from halfbyte.cli.inspection import Inspection
from halfbyte.cli.output import JsonValue, format_bytes
from halfbyte.formats.gguf_file import GgufFile
from halfbyte.formats.stored_tensors import StoredTensor

SHAPE = {
    "block_count": "{:,} layers",
    "embedding_length": "hidden size {:,}",
    "attention.head_count": "{:,} attention heads",
    "attention.head_count_kv": "{:,} of keys and values",
    "context_length": "context of {:,}",
}
"""Key below the architecture's name -> how to say it."""


def inspect_gguf(path: Path) -> Inspection:
    """Explain a GGUF file.

    Raises:
        FormatError, UnsafeArtifactError, MissingFileError: See `GgufFile.open`.
    """
    file = GgufFile.open(path)
    tensors = [
        StoredTensor(e.name, e.type_name, e.shape, math.prod(e.shape), e.end - e.begin)
        for e in sorted(file.entries.values(), key=lambda entry: entry.name)
    ]
    architecture = _text(file, "general.architecture")
    num_parameters = sum(t.num_elements for t in tensors)
    num_bytes = sum(t.nbytes for t in tensors)
    bits = f"{8 * num_bytes / num_parameters:.3f} bits a parameter" if num_parameters else "none"
    facts = {
        "name": _text(file, "general.name") or "unknown",
        "family": architecture or "unknown: general.architecture is not set",
        "shape": _shape(file, architecture) or "unknown",
        "runs here": "after `halfbyte quantize`, which reads GGUF",
        "parameters": f"{num_parameters:,} in {len(tensors)} tensors",
        "size": f"{format_bytes(num_bytes)} of tensors, {bits}",
        "stored as": describe_storage(tensors) or "nothing",
        "tokenizer": _text(file, "tokenizer.ggml.model") or "none",
        "licence": _text(file, "general.license") or "unknown",
    }
    record: dict[str, JsonValue] = {
        "family": architecture,
        "num_parameters": num_parameters,
        "num_tensors": len(tensors),
        "bytes": num_bytes,
        "storage": storage_record(tensors),
    }
    return Inspection(path, "gguf", "a GGUF file", facts, (), record, tensors)


def _text(file: GgufFile, key: str) -> str | None:
    value = file.metadata.get(key)
    return value[:200] if isinstance(value, str) and value else None


def _shape(file: GgufFile, architecture: str | None) -> str:
    phrases = []
    for key, phrase in SHAPE.items():
        count = file.metadata.get(f"{architecture}.{key}")
        if type(count) is int:
            phrases.append(phrase.format(count))
    return ", ".join(phrases)

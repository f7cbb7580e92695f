"""Explaining a model directory in Hugging Face's layout, and a lone safetensors file."""

from collections.abc import Mapping
from pathlib import Path

from halfbyte.cli.inspect_files import (
    count_of,
    describe_provenance,
    describe_quantization,
    describe_storage,
    pickle_doubts,
    quantization_record,
    read_optional_json,
    storage_record,
    text_of,
)
from halfbyte.cli.inspection import Inspection
from halfbyte.cli.output import JsonValue, format_bytes
from halfbyte.errors import HalfbyteError
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.shards import INDEX, SINGLE, open_shards
from halfbyte.formats.stored_tensors import StoredTensor, list_stored_tensors
from halfbyte.models.config import read_config

SHAPE = {
    "num_hidden_layers": "{:,} layers",
    "hidden_size": "hidden size {:,}",
    "num_attention_heads": "{:,} attention heads",
    "num_key_value_heads": "{:,} of keys and values",
    "vocab_size": "vocabulary of {:,}",
    "max_position_embeddings": "context of {:,}",
}
"""Key of config.json -> how to say it."""


def is_model(directory: Path) -> bool:
    """Whether a directory looks like a model's."""
    return any((directory / name).exists() for name in ("config.json", SINGLE, INDEX))


def inspect_model(directory: Path) -> Inspection:
    """Explain a model directory from its config and the headers of its tensors.

    Raises:
        FormatError, UnsafeArtifactError, MissingFileError, StorageError: See `open_shards` and
            `list_stored_tensors`.
    """
    config = read_optional_json(directory / "config.json")
    shards = open_shards(directory)
    tensors = list_stored_tensors(shards)
    provenance, provenance_record = describe_provenance(directory)
    doubts = [] if config is None else _config_doubts(config, tensors)
    bits = "4 bits" if any(t.state for t in tensors) else _widest(tensors)
    facts = {
        "family": _family(config),
        "shape": _shape(config),
        "runs here": _runs(directory),
        "parameters": f"{sum(t.num_elements for t in tensors):,} in {len(tensors)} tensors",
        "size": f"{format_bytes(sum(f.size for f in shards.files))} in {len(shards.files)} file"
        + ("s" if len(shards.files) > 1 else ""),
        "stored as": describe_storage(tensors) or "nothing",
        "quantization": describe_quantization(tensors) or "none",
        "tokenizer": _tokenizer(directory),
        "provenance": provenance,
    }
    record: dict[str, JsonValue] = {
        "family": None if config is None else text_of(config, "model_type"),
        "num_parameters": sum(t.num_elements for t in tensors),
        "num_tensors": len(tensors),
        "bytes": sum(f.size for f in shards.files),
        "storage": storage_record(tensors),
        "quantization": quantization_record(tensors),
        "provenance": provenance_record,
    }
    doubts += pickle_doubts(directory)
    return Inspection(directory, "model", f"a model in {bits}", facts, doubts, record, tensors)


def inspect_safetensors(path: Path) -> Inspection:
    """Explain one safetensors file from its header.

    Raises:
        FormatError, UnsafeArtifactError, MissingFileError, StorageError: See
            `SafetensorsFile.open` and `list_stored_tensors`.
    """
    file = SafetensorsFile.open(path)
    tensors = list_stored_tensors({name: (file, entry) for name, entry in file.entries.items()})
    metadata = ", ".join(f"{key}={value!r:.60}" for key, value in list(file.metadata.items())[:8])
    facts = {
        "parameters": f"{sum(t.num_elements for t in tensors):,} in {len(tensors)} tensors",
        "size": format_bytes(file.size),
        "stored as": describe_storage(tensors) or "nothing",
        "quantization": describe_quantization(tensors) or "none",
        "metadata": metadata or "none",
    }
    record: dict[str, JsonValue] = {
        "num_parameters": sum(t.num_elements for t in tensors),
        "num_tensors": len(tensors),
        "bytes": file.size,
        "storage": storage_record(tensors),
        "quantization": quantization_record(tensors),
        "metadata": dict(file.metadata),
    }
    return Inspection(path, "safetensors", "a safetensors file", facts, (), record, tensors)


def _family(config: Mapping[str, object] | None) -> str:
    if config is None:
        return "unknown: there is no config.json"
    architectures = config.get("architectures")
    names = (
        [a for a in architectures if isinstance(a, str)] if isinstance(architectures, list) else []
    )
    family = text_of(config, "model_type") or "unknown: config.json has no model_type"
    return f"{family} ({', '.join(names)[:200]})" if names else family


def _shape(config: Mapping[str, object] | None) -> str:
    if config is None:
        return "unknown"
    inner = config.get("text_config")
    values = inner if isinstance(inner, dict) else config
    phrases = [
        phrase.format(count)
        for key, phrase in SHAPE.items()
        if (count := count_of(values, key)) is not None
    ]
    return ", ".join(phrases) or "unknown"


def _runs(directory: Path) -> str:
    """Whether our decoder knows what the config describes."""
    try:
        notes = read_config(directory).notes
    except HalfbyteError as error:
        return f"no: {'; '.join([error.message, *error.problems][:4])}"
    return "yes" + "".join(f"; {note}" for note in notes)


def _widest(tensors: list[StoredTensor]) -> str:
    """The dtype of most parameters."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.stored] = counts.get(tensor.stored, 0) + tensor.num_elements
    return max(counts, key=lambda stored: counts[stored], default="nothing")


def _tokenizer(directory: Path) -> str:
    if not (directory / "tokenizer.json").exists():
        return "none: there is no tokenizer.json"
    settings = read_optional_json(directory / "tokenizer_config.json") or {}
    has_template = "chat_template" in settings or (directory / "chat_template.jinja").exists()
    return f"tokenizer.json, {'with' if has_template else 'without'} a chat template"


def _config_doubts(config: Mapping[str, object], tensors: list[StoredTensor]) -> list[str]:
    doubts = []
    if "auto_map" in config:
        doubts.append("config.json names code to run (auto_map): halfbyte never runs it")
    stated = config.get("quantization_config")
    quantized = [tensor for tensor in tensors if tensor.state is not None]
    if isinstance(stated, dict) and not quantized:
        method = text_of(stated, "quant_method") or "unknown"
        doubts.append(f"config.json speaks of {method} quantization, and no weight is in 4 bits")
    elif quantized and not isinstance(stated, dict):
        doubts.append("weights are in 4 bits, and config.json has no quantization_config")
    elif isinstance(stated, dict):
        codebook = text_of(stated, "bnb_4bit_quant_type") or text_of(stated, "codebook")
        others = sorted({tensor.stored for tensor in quantized} - {codebook})
        if others:
            doubts.append(f"config.json says {codebook}, the weights are {', '.join(others)}")
    return doubts

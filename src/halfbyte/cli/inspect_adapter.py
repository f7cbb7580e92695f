"""Explaining an adapter directory in PEFT's layout, from its config and its tensors' header."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from halfbyte.cli.inspect_files import (
    count_of,
    describe_provenance,
    describe_storage,
    number_of,
    pickle_doubts,
    storage_record,
    text_of,
)
from halfbyte.cli.inspection import Inspection
from halfbyte.cli.output import JsonValue, format_bytes
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.stored_tensors import StoredTensor, list_stored_tensors
from halfbyte.storage.json_file import read_json_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = {".lora_A.weight": 0, ".lora_B.weight": 1}
"""Ending of a factor's name -> the position of the rank in its shape."""


def inspect_adapter(directory: Path) -> Inspection:
    """Explain an adapter.

    Raises:
        FormatError, UnsafeArtifactError, MissingFileError, StorageError: See
            `SafetensorsFile.open` and `read_json_object`.
    """
    config = read_json_object(directory / CONFIG)
    file = SafetensorsFile.open(directory / WEIGHTS)
    tensors = list_stored_tensors({name: (file, entry) for name, entry in file.entries.items()})
    ranks, doubts = _factor_ranks(tensors)
    targets = Counter(path.rpartition(".")[2] for path in ranks)
    base = text_of(config, "base_model_name_or_path")
    provenance, provenance_record = describe_provenance(directory)
    if provenance_record is None:
        doubts.append(
            "the base is known by name only: nothing says which weights it was trained on"
        )
    stated = config.get("r")
    if ranks and stated not in ranks.values():
        doubts.append(f"{CONFIG} says rank {stated!r:.20}, the factors have {_ranks(ranks)}")
    facts = {
        "method": _method(config),
        "rank": _ranks(ranks) or "unknown",
        "scaling": _scaling(config),
        "targets": ", ".join(f"{name} x {n}" for name, n in sorted(targets.items())) or "none",
        "base model": base or f"unknown: {CONFIG} does not say",
        "parameters": f"{sum(t.num_elements for t in tensors):,} in {len(tensors)} tensors",
        "size": format_bytes(file.size),
        "stored as": describe_storage(tensors) or "nothing",
        "provenance": provenance,
    }
    record: dict[str, JsonValue] = {
        "base_model": base,
        "ranks": sorted(set(ranks.values())),
        "targets": dict(sorted(targets.items())),
        "num_parameters": sum(t.num_elements for t in tensors),
        "bytes": file.size,
        "storage": storage_record(tensors),
        "provenance": provenance_record,
    }
    doubts += pickle_doubts(directory)
    return Inspection(directory, "adapter", "an adapter", facts, doubts, record, tensors)


def _factor_ranks(tensors: list[StoredTensor]) -> tuple[dict[str, int], list[str]]:
    """Module path -> rank, and what is wrong with the factors."""
    factors: dict[str, dict[str, int]] = {}
    doubts = []
    for tensor in tensors:
        ending = next((e for e in FACTORS if tensor.name.endswith(e)), None)
        if ending is None or len(tensor.shape) != 2:  # noqa: PLR2004
            doubts.append(f"{tensor.name:.100}: not a factor of a linear layer")
            continue
        path = tensor.name.removesuffix(ending).removeprefix(PREFIX)
        factors.setdefault(path, {})[ending] = tensor.shape[FACTORS[ending]]
    for path, ranks in factors.items():
        if len(ranks) < len(FACTORS):
            doubts.append(f"{path:.100}: one of its two factors is missing")
        elif len(set(ranks.values())) > 1:
            a, b = (ranks[ending] for ending in FACTORS)
            doubts.append(f"{path:.100}: A has rank {a} and B has rank {b}")
    shown = 10
    if len(doubts) > shown:
        doubts[shown:] = [f"and {len(doubts) - shown} more of this kind"]
    return {path: next(iter(ranks.values())) for path, ranks in factors.items()}, doubts


def _ranks(ranks: Mapping[str, int]) -> str:
    counts = Counter(ranks.values())
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{rank} in {n} layers" for rank, n in sorted(counts.items()))


def _method(config: Mapping[str, object]) -> str:
    kind = text_of(config, "peft_type") or "unknown"
    extras = [
        name
        for key, name in (("use_dora", "DoRA"), ("modules_to_save", "modules saved whole"))
        if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        extras.append("biases")
    return " with ".join([kind, " and ".join(extras)] if extras else [kind])


def _scaling(config: Mapping[str, object]) -> str:
    alpha, rank = number_of(config, "lora_alpha"), count_of(config, "r")
    if alpha is None or rank is None or rank < 1:
        return "unknown"
    rslora = bool(config.get("use_rslora"))
    scaling = alpha / rank**0.5 if rslora else alpha / rank
    rule = "alpha / sqrt(rank), rsLoRA" if rslora else "alpha / rank"
    patterns = " unless a pattern says otherwise" if config.get("rank_pattern") else ""
    return f"{scaling:g}, with alpha {alpha:g} and rank {rank} ({rule}){patterns}"

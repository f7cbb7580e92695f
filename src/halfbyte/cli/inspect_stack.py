"""Explaining a stack of adapters, from its record and the headers of its parts."""

from collections.abc import Mapping
from pathlib import Path

from halfbyte.adapters.stack_files import PartRecord, read_stack_record
from halfbyte.cli.inspect_adapter import inspect_adapter
from halfbyte.cli.inspection import Inspection
from halfbyte.cli.output import JsonValue


def inspect_stack(directory: Path) -> Inspection:
    """Explain a stack.

    Raises:
        FormatError, UnsafeArtifactError, MissingFileError, StorageError: The record or a part is
            not what it should be.
    """
    record = read_stack_record(directory)
    found = [(part, inspect_adapter(directory / part.directory)) for part in record.parts]
    facts = {
        "order": " > ".join(part.name for part in record.parts),
        "base": record.base or "unknown: no part says what it was trained on",
    }
    doubts = ["fingerprints, and the order of training, are checked when it is loaded, not here"]
    for part, adapter in found:
        facts[part.directory] = f"rank {adapter.facts['rank']}, {adapter.facts['parameters']}"
        doubts += [f"{part.directory}: {doubt}" for doubt in adapter.doubts]
    title = f"a stack of {len(found)} adapter{'s' if len(found) > 1 else ''}"
    parts = [_part_record(part, adapter) for part, adapter in found]
    return Inspection(
        directory, "stack", title, facts, doubts, {"base": record.base, "parts": parts}
    )


def _part_record(part: PartRecord, adapter: Inspection) -> Mapping[str, JsonValue]:
    return {"name": part.name, "fingerprint": part.fingerprint, **adapter.record}

"""Explaining what training leaves: a run directory, and one checkpoint of it."""

from collections.abc import Mapping
from pathlib import Path

from halfbyte.adapters.stack_files import is_stack
from halfbyte.cli.inspect_adapter import CONFIG as ADAPTER_CONFIG
from halfbyte.cli.inspect_adapter import inspect_adapter
from halfbyte.cli.inspect_files import describe_storage, storage_record
from halfbyte.cli.inspect_stack import inspect_stack
from halfbyte.cli.inspection import Inspection
from halfbyte.cli.output import JsonValue, format_bytes
from halfbyte.errors import FormatError
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.stored_tensors import list_stored_tensors
from halfbyte.storage.files import open_regular, read_exactly
from halfbyte.storage.json_file import parse_json_object

MANIFEST, METRICS, CHECKPOINTS, MODEL = "MANIFEST.json", "metrics.jsonl", "checkpoints", "model"
LAST_BYTES = 1 << 16
"""How much of the end of `metrics.jsonl` is looked at; a record takes a few hundred bytes."""

SHOWN_METRICS = ("step", "loss", "eval_loss", "eval_perplexity", "learning_rate", "num_tokens")


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory looks like a checkpoint."""
    return (directory / MANIFEST).exists() and not (directory / "config.json").exists()


def is_run(directory: Path) -> bool:
    """Whether a directory looks like a run's."""
    return (directory / METRICS).exists() or (directory / CHECKPOINTS).is_dir()


def inspect_checkpoint(directory: Path) -> Inspection:
    """Explain a checkpoint from the headers of its tensors.

    Raises:
        FormatError, UnsafeArtifactError, StorageError: A tensor file is not what it should be.
    """
    files = [SafetensorsFile.open(p) for p in sorted(directory.glob("*.safetensors"))]
    tensors = []
    for file in files:
        contents = {name: (file, entry) for name, entry in file.entries.items()}
        tensors += list_stored_tensors(contents)
    facts = {
        "tensors": f"{len(tensors)} in {len(files)} files",
        "size": format_bytes(sum(file.size for file in files)),
        "stored as": describe_storage(tensors) or "nothing",
        "files": ", ".join(sorted(path.name for path in directory.iterdir())),
    }
    doubts = [f"the hashes in {MANIFEST} are checked when a run resumes, not here"]
    record: dict[str, JsonValue] = {
        "num_tensors": len(tensors),
        "bytes": sum(file.size for file in files),
        "storage": storage_record(tensors),
    }
    return Inspection(directory, "checkpoint", "a checkpoint", facts, doubts, record, tensors)


def inspect_run(directory: Path) -> Inspection:
    """Explain a run: how far it came, what it can resume from, what it made.

    Raises:
        FormatError, UnsafeArtifactError, StorageError: A file is not what it should be.
    """
    folder = directory / CHECKPOINTS
    checkpoints = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    whole = [name for name in checkpoints if is_checkpoint(folder / name)]
    last = _last_record(directory / METRICS)
    doubts = [
        f"{CHECKPOINTS}/{name}: no {MANIFEST}, so it was not finished"
        for name in checkpoints
        if name not in whole
    ]
    facts = {
        "last record": _describe_record(last),
        "checkpoints": ", ".join(whole) or "none",
        "adapter": "none: the run is not finished",
    }
    record: dict[str, JsonValue] = {
        "last_record": {key: str(value) for key, value in last.items()},
        "checkpoints": whole,
        "adapter": None,
    }
    if (directory / "adapter" / ADAPTER_CONFIG).exists():
        adapter = inspect_adapter(directory / "adapter")
        facts["adapter"] = f"rank {adapter.facts['rank']}, {adapter.facts['parameters']}"
        facts["base model"] = adapter.facts["base model"]
        record["adapter"] = adapter.record
    elif is_stack(directory / "adapter"):
        stack = inspect_stack(directory / "adapter")
        facts["adapter"] = f"{stack.title}: {stack.facts['order']}"
        record["adapter"] = stack.record
    elif (directory / MODEL).is_dir():
        del facts["adapter"]
        facts["model"] = f"{MODEL}/, all of its weights trained"
        record["model"] = MODEL
    return Inspection(directory, "run", "a training run", facts, doubts, record)


def _last_record(path: Path) -> Mapping[str, object]:
    """The last whole line of `metrics.jsonl`; a process that was killed may leave part of one."""
    if not path.exists():
        return {}
    with open_regular(path) as (descriptor, status):
        size = min(status.st_size, LAST_BYTES)
        tail = read_exactly(descriptor, size, status.st_size - size, path)
    lines = tail.split(b"\n")[:-1]
    if size < status.st_size:
        lines = lines[1:]  # the first one begins in the middle
    if not lines:
        if status.st_size > LAST_BYTES:
            raise FormatError(f"{path}: lines of at most {LAST_BYTES} bytes expected")
        return {}
    return parse_json_object(lines[-1], f"{path}, last line")


def _describe_record(record: Mapping[str, object]) -> str:
    shown = [f"{key} {record[key]!s:.20}" for key in SHOWN_METRICS if key in record]
    return ", ".join(shown) or f"none: {METRICS} has no whole line"

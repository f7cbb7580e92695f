"""Checkpoints: all that a run needs to go on exactly as if it had not stopped.

A checkpoint is a directory `checkpoints/step-000123` that exists whole or not at all: what is
trained, the optimizer's state, and counters, as safetensors and JSON. Its manifest is checked
before anything is used; a damaged one is passed over, by name, for the newest that is whole.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from halfbyte.errors import FormatError, HalfbyteError, VerificationError
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.storage.atomic import new_directory
from halfbyte.storage.json_file import read_json_object
from halfbyte.storage.manifest import verify_manifest, write_manifest

CHECKPOINTS = "checkpoints"
TRAINED_FILE = "trained.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The state of a run after a step.

    Attributes:
        step: Optimizer steps taken.
        trained: Parameters by name: factors of the adapter, or all weights.
        optimizer: Tensors of the optimizer's state by name.
        state: Counters, positions and resolved choices; plain JSON.
    """

    step: int
    trained: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class SkippedCheckpoint:
    """A checkpoint that cannot be used, and why."""

    path: Path
    reason: str


def write_checkpoint(run_directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, whole or not at all; one of the same step is replaced.

    Raises:
        StorageError: The disk is full; earlier checkpoints are untouched.
    """
    target = run_directory / CHECKPOINTS / f"step-{checkpoint.step:06d}"
    with new_directory(target, replace=True) as directory:
        write_safetensors(directory / TRAINED_FILE, checkpoint.trained)
        write_safetensors(directory / OPTIMIZER_FILE, checkpoint.optimizer)
        (directory / STATE_FILE).write_text(
            json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1) + "\n"
        )
        write_manifest(directory)
    return target


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every byte of it against its manifest.

    Raises:
        VerificationError: A file is damaged, missing, or not listed.
        FormatError: The files do not hold what a checkpoint holds.
    """
    verify_manifest(path)
    state = read_json_object(path / STATE_FILE)
    step = state.get("step")
    match = _NAME.fullmatch(path.name)
    if not isinstance(step, int) or match is None or step != int(match[1]):
        raise FormatError(f"{path / STATE_FILE}: the step of {path.name} expected, found {step!r}")
    trained, optimizer = (
        {name: file.read(name) for name in file.entries}
        for file in map(SafetensorsFile.open, (path / TRAINED_FILE, path / OPTIMIZER_FILE))
    )
    return Checkpoint(step, trained, optimizer, state)


def newest_valid(run_directory: Path) -> tuple[Checkpoint | None, list[SkippedCheckpoint]]:
    """The newest checkpoint that is whole, and the newer ones that are not."""
    skipped: list[SkippedCheckpoint] = []
    for path in reversed(list_checkpoints(run_directory)):
        try:
            return read_checkpoint(path), skipped
        except (HalfbyteError, OSError) as error:
            skipped.append(SkippedCheckpoint(path, str(error)))
    return None, skipped


def prune_checkpoints(run_directory: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints, if the newest is whole.

    A damaged newest checkpoint means that an older one may be the only one of use: then nothing
    is deleted. Returns what was.
    """
    paths = list_checkpoints(run_directory)
    surplus = paths[:-keep]
    if not surplus:
        return []
    try:
        verify_manifest(paths[-1])
    except (VerificationError, OSError):
        return []
    for path in surplus:
        shutil.rmtree(path)
    return surplus


def list_checkpoints(run_directory: Path) -> list[Path]:
    """Directories named like checkpoints, oldest first."""
    folder = run_directory / CHECKPOINTS
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]

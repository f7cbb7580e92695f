"""A directory of safetensors: one file, or shards and the index that says which tensor is where."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from halfbyte.errors import FormatError, MissingFileError, UnsafeArtifactError
from halfbyte.formats.safetensors_file import MappedSafetensors, SafetensorsFile
from halfbyte.formats.safetensors_header import TensorEntry, shortened
from halfbyte.storage.atomic import write_file
from halfbyte.storage.json_file import read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Shards(Mapping[str, tuple[SafetensorsFile, TensorEntry]]):
    """All tensors of a directory: name -> the file that holds it, and where.

    Attributes:
        directory: What was opened.
        files: In order of name.
    """

    directory: Path
    files: tuple[SafetensorsFile, ...]
    _homes: Mapping[str, SafetensorsFile]

    def __getitem__(self, name: str) -> tuple[SafetensorsFile, TensorEntry]:
        file = self._homes[name]
        return file, file.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def read(self, name: str) -> Tensor:
        """One tensor in memory of its own.

        Raises:
            FormatError: There is none of that name, or its file changed since it was opened.
        """
        if name not in self._homes:
            raise FormatError(f"{self.directory}: no tensor {name!r} among {len(self)}")
        return self._homes[name].read(name)

    def map(self) -> "MappedShards":
        """All files as read-only memory."""
        return MappedShards(self)


class MappedShards:
    """The tensors of a directory over the pages of its files, as `MappedSafetensors`."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self._maps = {file.path: file.map() for file in shards.files}

    def tensor(self, name: str) -> Tensor:
        """One tensor over the pages of its file.

        Raises:
            FormatError: There is none of that name.
        """
        return self.home(name).tensor(name)

    def home(self, name: str) -> MappedSafetensors:
        """The map that holds a tensor.

        Raises:
            FormatError: There is none of that name.
        """
        if name not in self.shards:
            raise FormatError(
                f"{self.shards.directory}: no tensor {name!r} among {len(self.shards)}"
            )
        return self._maps[self.shards[name][0].path]


def open_shards(directory: Path | str) -> Shards:
    """Open `model.safetensors`, or all shards that `model.safetensors.index.json` names.

    The index and the files must agree both ways. File names in the index must be plain names in
    the directory; a symbolic link there is followed, to a regular file only.

    Raises:
        MissingFileError: Neither is there.
        UnsafeArtifactError: The index names something outside the directory, or a shard is not a
            regular file.
        FormatError: A file is not valid, index and files disagree, or both kinds are there; all
            faults are listed.
        StorageError: A file cannot be read.
    """
    directory = Path(directory)
    single, index = directory / SINGLE, directory / INDEX
    has_single, has_index = _is_there(single), _is_there(index)
    if has_single and has_index:
        raise FormatError(
            f"{directory} holds both {SINGLE} and {INDEX}",
            hint="Remove the one that is not meant.",
        )
    if has_single:
        file = SafetensorsFile.open(single)
        return Shards(directory, (file,), dict.fromkeys(file.entries, file))
    if not has_index:
        raise MissingFileError(
            f"{directory}: {SINGLE} or {INDEX} expected, found neither",
            hint="A checkpoint in another format: `halfbyte quantize` reads it.",
        )
    return _open_indexed(directory, index)


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _open_indexed(directory: Path, index: Path) -> Shards:
    weight_map = _weight_map(index)
    files: list[SafetensorsFile] = []
    problems: list[str] = []
    for name in sorted(set(weight_map.values())):
        try:
            files.append(SafetensorsFile.open(directory / name))
        except MissingFileError:
            problems.append(f"{name}: named by the index, missing from the directory")
        except FormatError as error:
            problems += [f"{name}: {p}" for p in error.problems]
    problems += _disagreements(weight_map, files)
    if problems:
        raise FormatError(
            f"{index} does not describe its files",
            problems=shortened(problems),
            hint="The download is incomplete, or files of two checkpoints were mixed.",
        )
    return Shards(directory, tuple(files), {n: file for file in files for n in file.entries})


def _disagreements(weight_map: Mapping[str, str], files: Sequence[SafetensorsFile]) -> list[str]:
    problems: list[str] = []
    homes: dict[str, str] = {}
    for file in files:
        for name in file.entries:
            if name in homes:
                problems.append(f"{name!r}: in {homes[name]} and in {file.path.name}")
            elif name not in weight_map:
                problems.append(f"{name!r}: in {file.path.name}, not in the index")
            homes[name] = file.path.name
    entries = {file.path.name: file.entries for file in files}
    problems += [
        f"{name!r}: in {shard} by the index, not in that file"
        for name, shard in weight_map.items()
        if shard in entries and name not in entries[shard]
    ]
    return problems


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map: an object of tensor name to file name expected")
    problems = [
        f"{name!r}: a file name expected, found {shard!r:.60}"
        for name, shard in weight_map.items()
        if not isinstance(shard, str)
    ]
    if problems:
        raise FormatError(f"{index}: weight_map", problems=shortened(problems))
    outside = [name for name in sorted(set(weight_map.values())) if not _is_plain(name)]
    if outside:
        raise UnsafeArtifactError(
            f"{index} names files that are not plain names in its directory",
            problems=shortened([repr(name[:60]) for name in outside]),
        )
    return weight_map


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and not any(c in name for c in "/\\\0")


def plan_shards(
    groups: Iterable[Mapping[str, int]], *, max_bytes: int = DEFAULT_SHARD_BYTES
) -> list[list[str]]:
    """Cut tensors into shards in the order given.

    Args:
        groups: Tensors that belong together, such as the parts of one 4-bit weight: name -> bytes.
            A group is never cut, so one group larger than `max_bytes` is a shard of its own.
        max_bytes: What the tensors of a shard may take.

    Returns:
        The names of each shard.
    """
    shards: list[list[str]] = []
    used = 0
    for group in groups:
        size = sum(group.values())
        if not shards or used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1] += group
        used += size
    return shards


def shard_file_names(num_shards: int) -> list[str]:
    """What to call the files of a model, as Hugging Face does."""
    if num_shards == 1:
        return [SINGLE]
    return [f"model-{i:05}-of-{num_shards:05}.safetensors" for i in range(1, num_shards + 1)]


def write_index(directory: Path, files: Sequence[SafetensorsFile]) -> None:
    """Write the index of shards that lie in `directory`; a single file needs none."""
    names = sorted((name, file.path.name) for file in files for name in file.entries)
    total = sum(entry.nbytes for file in files for entry in file.entries.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(names)}
    write_file(directory / INDEX, (json.dumps(content, indent=2) + "\n").encode())

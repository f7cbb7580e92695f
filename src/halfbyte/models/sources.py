"""Where a model to quantize comes from, seen one tensor at a time.

A source is a directory of Hugging Face (safetensors, or `.bin` files of older days), a GGUF file,
or a model id of the hub. All look alike behind `Source`: Hugging Face names, a config, and the
small files that belong beside the weights.
"""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from halfbyte.errors import (
    FormatError,
    MissingFileError,
    UnsafeArtifactError,
    UnsupportedError,
    UsageError,
)
from halfbyte.formats.gguf_file import GgufFile
from halfbyte.formats.shards import INDEX, SINGLE, MappedShards, open_shards
from halfbyte.models.bin_files import BIN_INDEX, BIN_SINGLE, open_bin_files
from halfbyte.models.gguf_model import GgufModel
from halfbyte.models.gguf_tokenizer import tokenizer_files
from halfbyte.models.hub import download, is_hub_id
from halfbyte.storage.files import open_regular, read_exactly
from halfbyte.storage.json_file import read_json_object

COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
"""Files that are copied beside the weights, if they are there."""

MAX_COMPANION_BYTES = 256 << 20


class Tensors(Protocol):
    """Tensors by name, read one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in their files, to measure progress by."""
        ...

    def size(self, name: str) -> int:
        """Bytes of one tensor in its file."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor of a floating type; it may lie over the pages of its file."""
        ...

    def release(self, name: str) -> None:
        """The tensor is no longer needed: let its pages go."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """A model to quantize.

    Attributes:
        tensors: Its weights.
        config: The object in `config.json`.
        generation_config: The object in `generation_config.json`, or None.
        files: Name -> content of further files to write.
        description: Where it came from: kind, name, revision.
        notes: What the user should know.
    """

    tensors: Tensors
    config: Mapping[str, object]
    generation_config: Mapping[str, object] | None
    files: Mapping[str, bytes]
    description: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())


def open_source(source: str | Path) -> Source:
    """Open whatever `source` names. Costs headers only; a hub id is downloaded first.

    Args:
        source: A directory, a `.gguf` file, or a hub id such as `org/model`, which is looked up
            only if no such path exists.

    Raises:
        MissingFileError: There is nothing of that name.
        FormatError, UnsafeArtifactError, UnsupportedError: It is damaged, asks for code to be run,
            or is of a kind that is not known.
    """
    path = Path(source)
    if path.is_dir():
        return _open_directory(path, {"kind": "directory", "name": path.resolve().name})
    if path.exists():
        return _open_file(path)
    if is_hub_id(str(source)):
        directory, revision = download(str(source))
        description = {"kind": "hub", "name": str(source), "revision": revision}
        return _open_directory(directory, description)
    raise MissingFileError(
        f"{source}: no such directory or file, and not a hub id such as org/model"
    )


def _open_file(path: Path) -> Source:
    if path.suffix != ".gguf":
        raise UnsupportedError(
            f"{path}: a model directory or a .gguf file expected",
            hint="Name the directory that holds the weights, not a file in it.",
        )
    file = GgufFile.open(path)
    model = GgufModel(file)
    files = {name: text.encode() for name, text in tokenizer_files(file).items()}
    generation = model.generation_config()
    files["generation_config.json"] = json_bytes(generation)
    return Source(
        _GgufTensors(model),
        model.config,
        generation,
        files,
        {"kind": "gguf", "name": path.name},
        notes=("the weights were quantized before: this rounds them a second time",)
        if any(entry.type_name.startswith("Q") for entry in file.entries.values())
        else (),
    )


def _open_directory(directory: Path, description: Mapping[str, str]) -> Source:
    config = read_json_object(directory / "config.json")
    _require_plain(config, directory)
    files, generation = read_companions(directory)
    notes: tuple[str, ...] = ()
    tensors: Tensors
    if any((directory / name).exists() for name in (SINGLE, INDEX)):
        tensors = _ShardTensors(open_shards(directory).map())
    elif any((directory / name).exists() for name in (BIN_SINGLE, BIN_INDEX)):
        tensors = open_bin_files(directory)
        notes = (
            "the weights are pickled (.bin): read without running code in them; prefer safetensors",
        )
    else:
        raise MissingFileError(
            f"{directory}: no weights: one of {SINGLE}, {INDEX}, {BIN_SINGLE}, {BIN_INDEX} expected"
        )
    if not any(name in files for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        notes += ("there is no tokenizer: the result can be loaded, but not talked to",)
    return Source(tensors, config, generation, files, description, notes)


def read_companions(
    directory: Path,
) -> tuple[dict[str, bytes], Mapping[str, object] | None]:
    """The small files beside the weights, and the object in `generation_config.json` if there."""
    files = {name: _read(directory / name) for name in COMPANIONS if (directory / name).exists()}
    if "generation_config.json" not in files:
        return files, None
    return files, read_json_object(directory / "generation_config.json")


def require_no_code(config: Mapping[str, object], directory: Path) -> None:
    """Raise where `config.json` asks for code of its own.

    Raises:
        UnsafeArtifactError: It has `auto_map`.
    """
    if "auto_map" in config:
        raise UnsafeArtifactError(
            f"{directory}: config.json names code to be run with the model (`auto_map`): "
            f"{config['auto_map']!r:.120}",
            hint="That code is never run, and without it the model may be another one. If it is an "
            f"ordinary {config.get('model_type')!r} model, remove `auto_map` from config.json.",
        )


def _require_plain(config: Mapping[str, object], directory: Path) -> None:
    require_no_code(config, directory)
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        if isinstance(method, dict):
            method = method.get("quant_method", method)
        raise UnsupportedError(
            f"{directory} is quantized already: {method!r:.80}",
            hint="Quantize the 16-bit model that it was made from.",
        )


def _read(path: Path) -> bytes:
    with open_regular(path) as (descriptor, status):
        if status.st_size > MAX_COMPANION_BYTES:
            raise FormatError(
                f"{path}: at most {MAX_COMPANION_BYTES} bytes expected, found {status.st_size}"
            )
        return read_exactly(descriptor, status.st_size, 0, path)


def require_apart(out: Path, *sources: str | Path) -> None:
    """Raise where writing `out` would write into a source, or replace one.

    Raises:
        UsageError: `out` lies inside a source, or a source inside `out`.
    """
    target = out.resolve()
    for source in map(Path, sources):
        if not source.is_dir():
            continue
        if target.is_relative_to(source.resolve()):
            relation = f"lies inside the source {source}"
        elif source.resolve().is_relative_to(target):
            relation = f"holds the source {source}"
        else:
            continue
        raise UsageError(f"{out} {relation}", hint="Write beside it: the source stays as it is.")


def json_bytes(value: Mapping[str, object]) -> bytes:
    """A JSON file as it is written everywhere here."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


class _ShardTensors:
    """Tensors of safetensors files, over their pages."""

    def __init__(self, mapped: MappedShards) -> None:
        self._mapped = mapped
        self._entries = {name: entry for name, (_, entry) in mapped.shards.items()}
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.num_bytes = sum(entry.nbytes for entry in self._entries.values())

    def size(self, name: str) -> int:
        return self._entries[name].nbytes

    def read(self, name: str) -> Tensor:
        self._mapped.home(name).advise(name, mmap.MADV_WILLNEED)
        return self._mapped.tensor(name)

    def release(self, name: str) -> None:
        # Also where neighbours share a page: it is read again from the cache.
        self._mapped.home(name).advise(name, mmap.MADV_DONTNEED)


class _GgufTensors:
    """Tensors of a GGUF file, decoded."""

    def __init__(self, model: GgufModel) -> None:
        self._model = model
        self._entries = {name: model.file.entries[own] for name, own in model.names.items()}
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.num_bytes = sum(map(self.size, self._entries))

    def size(self, name: str) -> int:
        return self._entries[name].end - self._entries[name].begin

    def read(self, name: str) -> Tensor:
        return self._model.read(name)

    def release(self, name: str) -> None:
        self._model.file.forget(self._entries[name].name)

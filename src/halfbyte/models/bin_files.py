"""Weights in `.bin` files: pickles, read by torch without running what they ask to be run.

Such a file is a zip archive with a pickle that names the tensors inside. `weights_only` makes torch
read the pickle with a reader of its own that knows tensors and containers and nothing else.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.errors import FormatError, MissingFileError, UnsafeArtifactError
from halfbyte.storage.files import open_regular
from halfbyte.storage.json_file import read_json_object

BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
MAX_INDEX_BYTES = 64 << 20
MAX_PROBLEMS = 20


class BinFiles:
    """The tensors of one or several `.bin` files, over the pages of the files.

    Attributes:
        shapes: Name -> shape of every tensor.
        num_bytes: Bytes of all tensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        self.num_bytes = sum(self._sizes.values())

    def size(self, name: str) -> int:
        """Bytes of one tensor."""
        return self._sizes[name]

    def read(self, name: str) -> Tensor:
        """One tensor; it may lie over the pages of its file."""
        return self._tensors[name].contiguous()

    def release(self, name: str) -> None:
        """Forget a tensor; a file is unmapped when all of its tensors are forgotten."""
        del self._tensors[name]


def open_bin_files(directory: Path) -> BinFiles:
    """Open `pytorch_model.bin`, or all files that its index names.

    Raises:
        UnsafeArtifactError: A pickle asks for code to be run, the index names something outside
            the directory, or a file is not a regular one.
        FormatError: A file is damaged, holds something else than tensors, or disagrees with the
            index; all faults are listed.
    """
    names = [BIN_SINGLE]
    weight_map: Mapping[str, object] | None = None
    if (directory / BIN_INDEX).exists():
        weight_map = _weight_map(directory / BIN_INDEX)
        names = sorted({str(name) for name in weight_map.values()})
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for name in names:
        try:
            loaded = _load(directory / name)
        except MissingFileError:
            problems.append(f"{name}: named by the index, missing from the directory")
            continue
        for key, value in loaded.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                problems.append(
                    f"{name}: {key!r:.60}: a named tensor expected, found {type(value).__name__}"
                )
            elif key in tensors:
                problems.append(f"{key!r:.60}: in two files")
            elif value.layout != torch.strided or not value.is_floating_point():
                problems.append(f"{name}: {key!r:.60}: dense numbers of a floating type expected")
            else:
                tensors[key] = value
        if weight_map is not None:
            there = {key for key, home in weight_map.items() if home == name}
            problems += [f"{key!r:.60}: not in {name}" for key in sorted(there - loaded.keys())]
    if problems:
        raise FormatError(f"{directory}: unusable .bin files", problems=problems[:MAX_PROBLEMS])
    return BinFiles(tensors)


def _weight_map(path: Path) -> Mapping[str, object]:
    weight_map = read_json_object(path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: weight_map: an object of tensor name to file name expected")
    outside = [
        repr(name)[:80]
        for name in set(weight_map.values())
        if not isinstance(name, str) or not name.endswith(".bin") or any(c in name for c in "/\\\0")
    ]
    if outside:
        raise UnsafeArtifactError(
            f"{path} names files that are not plain names in its directory",
            problems=sorted(outside)[:MAX_PROBLEMS],
        )
    return weight_map


def _load(path: Path) -> dict[object, object]:
    with open_regular(path) as (_, status):
        size = status.st_size
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises pickle's errors, RuntimeError, EOFError and others
        text = str(error).split("\n\n")[0][:300]
        if "Unsupported" in text or "GLOBAL" in text or "weights_only" in str(error).lower():
            raise UnsafeArtifactError(
                f"{path}: the pickle asks for more than tensors: {text}",
                hint="Nothing of it was run. Take the model's safetensors files instead.",
            ) from None
        raise FormatError(
            f"{path} ({size} bytes) is damaged, or was written by torch before 1.6: {text}",
            hint="Load it with the torch that wrote it, and save it again.",
        ) from error
    if not isinstance(loaded, dict):
        raise FormatError(f"{path}: named tensors expected, found {type(loaded).__name__}")
    return loaded

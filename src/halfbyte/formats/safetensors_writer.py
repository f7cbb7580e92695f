"""Writing safetensors tensor by tensor: the layout is fixed first, then filled in any order.

The bytes are those of the safetensors library: tensors ordered by dtype, widest first, then by
name, so that each is aligned to its dtype. One thing the library cannot do: small parts whose size
is known only once they are written (JSON inside a tensor) may come late, after everything else.
"""

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.checks import describe, dtype_name
from halfbyte.formats.safetensors_header import DTYPES, MAX_ENTRIES, METADATA
from halfbyte.storage.atomic import new_file

MAX_LATE_BYTES = 9999

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of a tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes every announced tensor once, each at the position that the header will name.

    Holds one tensor at a time, and the late ones. Made by `SafetensorsWriter.open`.
    """

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        specs: Mapping[str, TensorSpec],
        late: Iterable[str],
        metadata: Mapping[str, str],
    ) -> None:
        self.path = path
        self._file = file
        ordered = sorted(specs.items(), key=lambda item: (-_RANKS[item[1].dtype], item[0]))
        self._specs = dict(ordered)
        self._late: dict[str, Tensor | None] = dict.fromkeys(late)
        self._metadata = dict(sorted(metadata.items()))
        # Late tensors as large as they may become: the header cannot grow beyond this.
        longest = TensorSpec(torch.uint8, (MAX_LATE_BYTES,))
        self._header_size = len(self._header(dict.fromkeys(self._late, longest)))
        self._begins: dict[str, int] = {}
        position = 8 + self._header_size
        for name, spec in ordered:
            self._begins[name] = position
            position += spec.nbytes
        self._end = position
        self._missing = set(specs)

    @staticmethod
    @contextmanager
    def open(
        path: Path | str,
        specs: Mapping[str, TensorSpec],
        *,
        late: Iterable[str] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator["SafetensorsWriter"]:
        """A context to write the tensors in; the file takes its name at its end, synced.

        Unless every tensor was written, and on any exception, no file is left.

        Args:
            path: Where to write; an older file is replaced at the end.
            specs: All tensors but the late ones.
            late: Names of uint8 vectors of at most 9999 bytes, of lengths not known yet. They end
                up behind all others, in this order.
            metadata: Text for `__metadata__`.

        Raises:
            FormatError: A dtype that files cannot hold, a name that is reserved, taken twice or
                not Unicode; at the end, a tensor that was not written.
            StorageError: The disk is full.
        """
        path, late = Path(path), tuple(late)
        _check_names(path, specs, late)
        with new_file(path) as file:
            writer = SafetensorsWriter(path, file, specs, late, metadata or {})
            yield writer
            writer._finish()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; late ones are kept until the end.

        Raises:
            FormatError: Not announced, written before, or of another dtype or shape.
        """
        if name in self._late:
            self._keep(name, tensor)
            return
        if name not in self._missing:
            fault = "written already" if name in self._specs else "not among those announced"
            raise FormatError(f"{self.path}: {name!r}: {fault}")
        spec = self._specs[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise FormatError(
                f"{self.path}: {name!r}: {dtype_name(spec.dtype)} {list(spec.shape)} announced, "
                f"found {describe(tensor)}"
            )
        self._file.seek(self._begins[name])
        self._file.write(_bytes_of(tensor))
        self._missing.remove(name)

    def sync(self) -> None:
        """Have the disk catch up with what was written; may run in a thread beside `write`.

        Then the sync at the end finds little left to do.
        """
        os.fdatasync(self._file.fileno())

    def _keep(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > MAX_LATE_BYTES:
            raise FormatError(
                f"{self.path}: {name!r}: a late tensor is uint8 [at most {MAX_LATE_BYTES}], "
                f"found {describe(tensor)}"
            )
        if self._late[name] is not None:
            raise FormatError(f"{self.path}: {name!r}: written already")
        self._late[name] = tensor.detach().clone()

    def _finish(self) -> None:
        late = {name: tensor for name, tensor in self._late.items() if tensor is not None}
        missing = [*self._missing, *(name for name in self._late if name not in late)]
        if missing:
            raise FormatError(
                f"{self.path}: announced and not written",
                problems=[repr(name) for name in sorted(missing)],
            )
        specs = {name: TensorSpec(torch.uint8, tuple(t.shape)) for name, t in late.items()}
        header = self._header(specs).ljust(self._header_size)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._header_size) + header)
        self._file.seek(self._end)
        for tensor in late.values():
            self._file.write(_bytes_of(tensor))

    def _header(self, late: Mapping[str, TensorSpec]) -> bytes:
        content: dict[str, object] = {METADATA: self._metadata} if self._metadata else {}
        position = 0
        for name, spec in [*self._specs.items(), *late.items()]:
            content[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.nbytes],
            }
            position += spec.nbytes
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)


def write_safetensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a file that takes its name once it is complete and synced.

    The bytes depend on the tensors and texts alone, not on their order.

    Raises:
        FormatError: A dtype that files cannot hold, or a reserved name.
        StorageError: The disk is full.
    """
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with SafetensorsWriter.open(path, specs, metadata=metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _check_names(path: Path, specs: Mapping[str, TensorSpec], late: tuple[str, ...]) -> None:
    names = [*specs, *late]
    problems = [f"{name!r}: twice" for name, count in Counter(names).items() if count > 1]
    problems += [f"{name!r}: not Unicode" for name in names if not _is_unicode(name)]
    problems += [
        f"{name!r}: dtype: one of {', '.join(map(dtype_name, _NAMES))} expected, "
        f"found {dtype_name(spec.dtype)}"
        for name, spec in specs.items()
        if spec.dtype not in _NAMES
    ]
    if METADATA in names:
        problems.append(f"{METADATA}: not a name for a tensor")
    if len(names) > MAX_ENTRIES:
        problems.append(f"at most {MAX_ENTRIES} tensors expected, found {len(names)}: use shards")
    if problems:
        raise FormatError(f"{path}: cannot be written", problems=problems)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data

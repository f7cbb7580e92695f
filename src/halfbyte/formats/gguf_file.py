"""Reading a GGUF file that others wrote: checked whole before a tensor is handed out.

Dequantization is that of the `gguf` package, which llama.cpp's authors keep; it is given only
bytes whose extent has been checked here.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.gguf_header import (
    MAX_PROBLEMS,
    GgufEntry,
    Value,
    parse_header,
)
from halfbyte.storage.files import open_regular

__all__ = ["GgufEntry", "GgufFile", "Value"]

CHUNK_ELEMENTS = 1 << 17
"""Decoded together: a few intermediates of half a MiB."""

T = TypeVar("T", int, float, bool, str)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file whose header has been checked.

    Attributes:
        path: Where it is.
        metadata: Key -> value.
        entries: Name -> tensor.
    """

    path: Path
    metadata: Mapping[str, Value]
    entries: Mapping[str, GgufEntry]
    _map: mmap.mmap

    @staticmethod
    def open(path: Path | str) -> "GgufFile":
        """Read and check the header; tensors stay in the file.

        Raises:
            MissingFileError: There is no such file.
            UnsafeArtifactError: Not a regular file.
            FormatError: Not a valid GGUF file, or tensors of types that cannot be read; all
                faults are listed.
        """
        path = Path(path)
        with open_regular(path) as (descriptor, status):
            if not status.st_size:
                raise FormatError(f"{path} is empty")
            mapped = mmap.mmap(descriptor, status.st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        with memoryview(mapped) as buffer:
            header = parse_header(buffer)
        if header.problems:
            more = len(header.problems) - MAX_PROBLEMS
            problems = header.problems[:MAX_PROBLEMS]
            raise FormatError(
                f"{path} cannot be read as GGUF",
                problems=[*problems, f"and {more} more"] if more > 0 else problems,
                hint="If the file is damaged or was cut short, download it again.",
            )
        return GgufFile(
            path, MappingProxyType(header.metadata), MappingProxyType(header.entries), mapped
        )

    def read(self, name: str, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """One tensor, decoded and rounded to `dtype`.

        Raises:
            FormatError: There is no such tensor.
        """
        if name not in self.entries:
            raise FormatError(f"{self.path}: no tensor {name!r} among {len(self.entries)}")
        entry = self.entries[name]
        kind = GGMLQuantizationType[entry.type_name]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        out = torch.empty(entry.shape, dtype=dtype)
        flat = out.view(-1)
        step = CHUNK_ELEMENTS // block
        num_blocks = flat.numel() // block
        for first in range(0, num_blocks, step):
            count = min(step, num_blocks - first)
            begin = entry.begin + first * block_bytes
            raw = np.frombuffer(self._map, np.uint8, count * block_bytes, begin)
            values = torch.from_numpy(_decoded(raw, kind))
            flat[first * block : (first + count) * block].copy_(values)
        return out

    def forget(self, name: str) -> None:
        """Give the pages of a tensor back, which will not be read again soon."""
        entry = self.entries[name]
        begin = entry.begin - entry.begin % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, begin, entry.end - begin)

    def get(self, key: str, kind: type[T]) -> T | None:
        """Metadata of one type, or None where the file has none.

        Raises:
            FormatError: It has another type.
        """
        value = self.metadata.get(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FormatError(f"{self.path}: {key}: {kind.__name__} expected, found {value!r:.60}")
        return value

    def get_list(self, key: str, kind: type[T]) -> list[T] | None:
        """A metadata array of one type, or None where the file has none.

        Raises:
            FormatError: It is no array, or of another type.
        """
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise FormatError(f"{self.path}: {key}: an array expected, found {value!r:.60}")
        typed = [one for one in value if isinstance(one, kind)]
        if len(typed) < len(value):
            raise FormatError(f"{self.path}: {key}: an array of {kind.__name__} expected")
        return typed


def _decoded(
    raw: "np.ndarray[tuple[int], np.dtype[np.uint8]]", kind: GGMLQuantizationType
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    if kind is GGMLQuantizationType.F32:
        return raw.view("<f4").copy()
    if kind is GGMLQuantizationType.F16:
        return raw.view("<f2").astype(np.float32)
    # Damaged scales may be infinite or NaN; who quantizes the result reports them.
    with np.errstate(over="ignore", invalid="ignore"):
        decoded: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = dequantize(raw, kind)
    return decoded.reshape(-1)

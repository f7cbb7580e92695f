"""Reading a safetensors file that others wrote: checked whole before a tensor is handed out.

Opening reads the header only. Tensors come either in memory of their own (`read`) or as views of
the file's pages (`map`), which processes share and which cannot be written to.
"""

import ctypes
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.safetensors_header import (
    Header,
    TensorEntry,
    header_length_fault,
    parse_header,
)
from halfbyte.storage.files import open_regular, read_exactly, read_into

__all__ = ["MappedSafetensors", "SafetensorsFile", "TensorEntry"]

_Identity = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A safetensors file whose header has been checked. Holds no descriptor open.

    Attributes:
        path: Where it is.
        entries: Name -> entry, in order of position.
        metadata: The text of its `__metadata__`.
        size: Bytes of the file.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    size: int
    _identity: _Identity

    @staticmethod
    def open(path: Path | str) -> "SafetensorsFile":
        """Read and check the header.

        The header must be JSON with each name once; dtypes must be known, shapes and ranges whole
        numbers that agree, and ranges must cover the data without overlap or hole to the file's
        end. Costs memory for the header only, which the file must really contain.

        Raises:
            MissingFileError: There is no such file.
            UnsafeArtifactError: Not a regular file.
            FormatError: Not a valid safetensors file; all faults are listed.
            StorageError: It cannot be read.
        """
        path = Path(path)
        with open_regular(path) as (descriptor, status):
            header = _read_header(descriptor, status.st_size, path)
        if header.problems:
            raise FormatError(
                f"{path} is not a valid safetensors file",
                problems=header.problems,
                hint="It is damaged or was cut short: download or write it again.",
            )
        return SafetensorsFile(
            path,
            MappingProxyType(header.entries),
            MappingProxyType(header.metadata),
            status.st_size,
            _identity(status),
        )

    def read(self, name: str) -> Tensor:
        """One tensor in memory of its own, contiguous, on the CPU.

        Raises:
            FormatError: There is no such tensor, the file changed since it was opened, or a
                boolean is neither 0 nor 1.
        """
        entry = self.entry(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        with open_regular(self.path) as (descriptor, status):
            self._require_unchanged(status)
            read_into(descriptor, _bytes_of(tensor), entry.begin, self.path)
        return _checked(tensor, entry, self.path)

    def map(self) -> "MappedSafetensors":
        """The whole file as read-only memory; costs address space, not memory.

        Raises:
            FormatError: The file changed since it was opened.
        """
        with open_regular(self.path) as (descriptor, status):
            self._require_unchanged(status)
            mapped = mmap.mmap(descriptor, self.size, mmap.MAP_SHARED, mmap.PROT_READ)
        return MappedSafetensors(self, mapped)

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies.

        Raises:
            FormatError: There is no such tensor.
        """
        if name not in self.entries:
            raise FormatError(f"{self.path}: no tensor {name!r} among {len(self.entries)}")
        return self.entries[name]

    def _require_unchanged(self, status: os.stat_result) -> None:
        if _identity(status) != self._identity:
            raise FormatError(
                f"{self.path} changed since it was opened: {self.size} bytes expected, "
                f"found {status.st_size}, written at {status.st_mtime_ns} ns",
                hint="Open it again.",
            )


class MappedSafetensors:
    """A file's tensors over its own pages, mapped PROT_READ: writing to one kills the process.

    The map lives as long as any tensor of it. A file that is truncated while mapped makes reading
    the lost pages a bus error; only copies (`SafetensorsFile.read`) are safe from that.
    """

    def __init__(self, file: SafetensorsFile, mapped: mmap.mmap) -> None:
        self.file = file
        self._map = mapped
        pages = np.frombuffer(mapped, np.uint8)
        # Through ctypes, because torch warns of every read-only buffer; the pages stay read-only.
        self._buffer = (ctypes.c_ubyte * file.size).from_address(pages.ctypes.data)
        self._buffer.pages = pages  # type: ignore[attr-defined]  # keeps the map alive

    def tensor(self, name: str) -> Tensor:
        """One tensor over the file's pages; a copy where its position is misaligned for its dtype.

        Raises:
            FormatError: There is no such tensor, or a boolean is neither 0 nor 1.
        """
        entry = self.file.entry(name)
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.begin % entry.dtype.itemsize:
            raw = torch.frombuffer(
                self._buffer, dtype=torch.uint8, count=entry.nbytes, offset=entry.begin
            )
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            tensor.view(-1).view(torch.uint8).copy_(raw)
        else:
            tensor = torch.frombuffer(
                self._buffer,
                dtype=entry.dtype,
                count=entry.nbytes // entry.dtype.itemsize,
                offset=entry.begin,
            ).view(entry.shape)
        return _checked(tensor, entry, self.file.path)

    def advise(self, name: str, advice: int) -> None:
        """`madvise` for the pages of one tensor, for example `mmap.MADV_WILLNEED`."""
        entry = self.file.entry(name)
        begin = entry.begin - entry.begin % mmap.PAGESIZE
        if entry.nbytes:
            self._map.madvise(advice, begin, entry.end - begin)


def _read_header(descriptor: int, size: int, path: Path) -> Header:
    if size < 8 + len("{}"):
        return _faulty(f"at least 10 bytes expected, found {size}")
    # The first byte as well: a length of gigabytes in a file of zeros costs nothing.
    length, first = struct.unpack("<Q1s", read_exactly(descriptor, 9, 0, path))
    if fault := header_length_fault(length, size):
        return _faulty(fault)
    if first != b"{":
        return _faulty(f"header: '{{' expected as its first byte, found {first!r}")
    return parse_header(read_exactly(descriptor, length, 8, path), size)


def _faulty(problem: str) -> Header:
    return Header({}, {}, (problem,))


def _identity(status: os.stat_result) -> _Identity:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _checked(tensor: Tensor, entry: TensorEntry, path: Path) -> Tensor:
    # Any other byte behind a bool is undefined behaviour in compiled code.
    if entry.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
        raise FormatError(f"{path}: {entry.name!r}: booleans of 0 or 1 expected, found other bytes")
    return tensor

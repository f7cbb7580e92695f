"""Where rows come from: a file, a folder or a glob, plain or compressed.

The order of files is the order of their names as text, so that it is the same on every
machine. Decompression is streamed: nothing larger than one read is held.
"""

import glob
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, BinaryIO

import zstandard

from halfbyte.errors import DataError, MissingFileError, StorageError

READ_SIZE = 1 << 16
"""Bytes taken from a compressed file at a time."""


class Kind(StrEnum):
    """How rows are written in a file."""

    JSONL = "JSON lines"
    JSON = "JSON"
    CSV = "CSV"
    TSV = "TSV"
    PARQUET = "Parquet"
    TEXT = "plain text"


SUFFIXES = {
    ".jsonl": Kind.JSONL,
    ".ndjson": Kind.JSONL,
    ".json": Kind.JSON,
    ".csv": Kind.CSV,
    ".tsv": Kind.TSV,
    ".parquet": Kind.PARQUET,
    ".txt": Kind.TEXT,
}

COMPRESSED_SUFFIXES = (".gz", ".zst")


class DamagedFileError(DataError):
    """A compressed file is cut off or corrupt. The reader adds its name."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of rows.

    Attributes:
        path: To open it.
        name: Its short name in messages: relative to the folder that was named, if any.
        kind: How rows are written in it.
    """

    path: Path
    name: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Sources:
    """The files behind a `data.train` or `data.eval`, in reading order.

    Attributes:
        files: At least one, all of one kind.
        ignored: Names of files in the folder that hold no rows by their suffix.
    """

    files: tuple[DataFile, ...]
    ignored: tuple[str, ...] = ()


def kind_of(path: Path) -> Kind | None:
    """The kind that a file name stands for, seen through `.gz` and `.zst`; None if unknown."""
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    return SUFFIXES.get(path.suffix.lower())


def find_sources(location: str | Path) -> Sources:
    """Find the files that a path, a folder or a glob stands for.

    A folder is searched with its subfolders; hidden files and unknown suffixes are left out,
    the latter named in `ignored`.

    Raises:
        MissingFileError: Nothing is there.
        DataError: A named file has an unknown suffix, or the files are of several kinds.
    """
    path = Path(location)
    if path.is_dir():
        names = sorted(_visible_files(path))
        found = [(path / name, name) for name in names]
        files, ignored = _with_kinds(found)
        if not files:
            raise MissingFileError(f"{location}: no data file in this folder", hint=_known())
    elif path.exists():
        files, ignored = _with_kinds([(path, path.name)])
    elif glob.has_magic(str(location)):
        matches = sorted(glob.glob(str(location), recursive=True))  # noqa: PTH207  (may be absolute)
        found = [(Path(name), name) for name in matches if Path(name).is_file()]
        files, ignored = _with_kinds(found)
        if not found:
            raise MissingFileError(f"{location}: this pattern matches no file")
    else:
        raise MissingFileError(f"{location}: no such file or folder")
    if not files:
        raise DataError(f"{location}: unknown kind of data file", problems=ignored, hint=_known())
    if len({file.kind for file in files}) > 1:
        raise DataError(
            f"{location}: files of several kinds",
            problems=[f"{file.name}: {file.kind}" for file in _first_of_each_kind(files)],
            hint="Name one of them, or a glob such as 'data/*.jsonl'.",
        )
    return Sources(tuple(files), tuple(ignored))


@contextmanager
def open_bytes(file: DataFile) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressing on the way.

    Raises:
        StorageError: It cannot be opened.
        DamagedFileError: Compressed data are cut off or corrupt; raised while reading.
    """
    try:
        raw = file.path.open("rb")
    except OSError as error:
        raise StorageError(f"{file.name}: cannot be opened: {error.strerror}") from error
    with raw:
        try:
            yield _decompressed(raw, file.path.suffix.lower())
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise DamagedFileError(f"damaged compressed file: {error}") from error


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdReader(raw))
    return raw


class _ZstdReader(io.RawIOBase):
    """Reads all frames of a zstd file. Unlike `stream_reader`, notices a missing end."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._started = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            if not (compressed := self._take()):
                return 0
            self._ready = memoryview(self._frame.decompress(compressed))
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _take(self) -> bytes:
        rest = b""
        if self._frame.eof:
            rest = self._frame.unused_data
            self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._started = False
        compressed = rest or self._raw.read(READ_SIZE)
        if not compressed and self._started:
            raise EOFError("the last frame has no end")
        self._started = self._started or bool(compressed)
        return compressed


def _visible_files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if not any(part.startswith(".") for part in relative.parts) and path.is_file():
            yield relative.as_posix()


def _with_kinds(found: list[tuple[Path, str]]) -> tuple[list[DataFile], list[str]]:
    files = []
    ignored = []
    for path, name in found:
        if kind := kind_of(path):
            files.append(DataFile(path, name, kind))
        else:
            ignored.append(name)
    return files, ignored


def _first_of_each_kind(files: list[DataFile]) -> list[DataFile]:
    first: dict[Kind, DataFile] = {}
    for file in files:
        first.setdefault(file.kind, file)
    return list(first.values())


def _known() -> str:
    return (
        f"Known suffixes: {', '.join(SUFFIXES)}, each also with "
        f"{' or '.join(COMPRESSED_SUFFIXES)} appended."
    )

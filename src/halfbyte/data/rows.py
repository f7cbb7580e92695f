"""Rows out of files, one at a time, each with the place it came from.

A fault in one row is reported and the next row is read, as long as the kind of file lets the
reader find it. One row is held at a time; a JSON array needs the text of its file.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from halfbyte.data.json_text import BadLineError, describe, json_rows, parse_json
from halfbyte.data.problems import Problems
from halfbyte.data.sources import DamagedFileError, DataFile, Kind, open_bytes
from halfbyte.errors import FormatError, MissingPackageError

MAX_FIELD_CHARACTERS = 2**31 - 1
"""Of one CSV field. The csv module stops at 131,072 by itself, too few for a document."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The place of a row: `train.jsonl:12`, `train.parquet:row 12`, `book.txt:token 4096`.

    Attributes:
        file: Short name of the file.
        number: Counted in `unit`, lines and rows from 1, tokens from 0.
        unit: `line`, `row` or `token`.
    """

    file: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        unit = "" if self.unit == "line" else f"{self.unit} "
        return f"{self.file}:{unit}{self.number}"


@dataclass(frozen=True, slots=True)
class Row:
    """Named values as they stand in the file, and where."""

    origin: Origin
    fields: Mapping[str, object]


def read_rows(file: DataFile, problems: Problems) -> Iterator[Row]:
    """Yield the rows of a file that is not plain text; report those that cannot be read.

    Raises:
        StorageError: The file cannot be opened.
        MissingPackageError: It is a Parquet file and pyarrow is not installed.
    """
    reader = _READERS[file.kind]
    try:
        with open_bytes(file) as stream:
            yield from reader(file, stream, problems)
    except DamagedFileError as error:
        problems.add(file.name, error.message)
    except BadLineError as error:
        problems.add(Origin(file.name, error.line), error.message)


def decode_line(line: bytes, number: int) -> str:
    """Decode line `number` (from 1) of a file as UTF-8, without a byte order mark.

    Raises:
        BadLineError: It is not UTF-8.
    """
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLineError(number, f"not UTF-8 text at byte {error.start}") from error


def _read_json_lines(file: DataFile, lines: Iterable[bytes], problems: Problems) -> Iterator[Row]:
    first_empty = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            first_empty = first_empty or number
            continue
        if first_empty:  # empty lines at the end of a file are harmless: wait for a row
            problems.add(Origin(file.name, first_empty), "empty row")
            first_empty = 0
        origin = Origin(file.name, number)
        try:
            value = parse_json(decode_line(line.rstrip(), number))
        except FormatError as error:
            problems.add(origin, error.message)
        else:
            yield from _object_row(origin, value, problems)


def _object_row(origin: Origin, value: object, problems: Problems) -> Iterator[Row]:
    if not isinstance(value, dict):
        problems.add(origin, f"an object expected, found {describe(value)}")
    elif not value:
        problems.add(origin, "empty row")
    else:
        yield Row(origin, value)


def _read_json(file: DataFile, stream: BinaryIO, problems: Problems) -> Iterator[Row]:
    """Rows of an array or of the one list in an object.

    Many files of JSON lines are named `.json`: a first line that is an object by itself,
    with more objects after it, is read as those.
    """
    data = stream.read()
    if _is_json_lines(data):
        yield from _read_json_lines(file, io.BytesIO(data), problems)
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadLineError(line, f"not UTF-8 text at byte {error.start} of the file") from error
    del data
    for line, value in json_rows(text):
        yield from _object_row(Origin(file.name, line), value, problems)


def _is_json_lines(data: bytes) -> bool:
    first, _, rest = data.partition(b"\n")
    if not rest.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(parse_json(decode_line(first, 1)), dict)
    except FormatError:
        return False


def _read_separated(file: DataFile, stream: BinaryIO, problems: Problems) -> Iterator[Row]:
    """Rows of a file with a header line; a quoted field may span lines."""
    # A setting of the whole csv module; raising it harms no other user of the module.
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    lines = (decode_line(line, number) for number, line in enumerate(stream, start=1))
    delimiter = "\t" if file.kind is Kind.TSV else ","
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for values in reader:
            origin = Origin(file.name, line)
            line = reader.line_num + 1
            if not header:
                header = values
                if wrong := {name for name in header if header.count(name) > 1 or not name}:
                    names = ", ".join(repr(name) for name in sorted(wrong))
                    problems.add(origin, f"column names must be given and differ, found {names}")
                    return
            elif not any(values):
                problems.add(origin, "empty row")
            elif len(values) != len(header):
                problems.add(origin, f"{len(header)} columns expected, found {len(values)}")
            else:
                yield Row(origin, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        problems.add(Origin(file.name, line), f"not {file.kind}: {error}")


def _read_parquet(file: DataFile, stream: BinaryIO, problems: Problems) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException  # noqa: PLC0415  (optional, and slow to import)
        from pyarrow.parquet import ParquetFile  # noqa: PLC0415
    except ImportError as error:
        raise MissingPackageError(
            f"{file.name}: reading Parquet files needs the package pyarrow",
            hint="Install it with: pip install pyarrow",
        ) from error
    # Parquet is read from its end, which a compressed stream cannot do.
    source = stream if file.path.suffix.lower() == ".parquet" else io.BytesIO(stream.read())
    number = 0
    try:
        for batch in ParquetFile(source).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield Row(Origin(file.name, number, "row"), fields)
    except ArrowException as error:
        reason = str(error).splitlines()[0]
        problems.add(Origin(file.name, number + 1, "row"), f"not Parquet: {reason}")


_READERS: Mapping[Kind, Callable[[DataFile, BinaryIO, Problems], Iterator[Row]]] = {
    Kind.JSONL: _read_json_lines,
    Kind.JSON: _read_json,
    Kind.CSV: _read_separated,
    Kind.TSV: _read_separated,
    Kind.PARQUET: _read_parquet,
}

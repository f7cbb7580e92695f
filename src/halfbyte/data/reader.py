"""Files, rows, examples, tokens: the way of a data set into memory."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.data.dataset import Dataset
from halfbyte.data.encode import Encoded, Encoder
from halfbyte.data.examples import Document, Example, RawPair, canonical, digest64, prompt_digest
from halfbyte.data.formats import Format, FormatChoice, FormatDetector
from halfbyte.data.options import DataOptions, Overlong
from halfbyte.data.parse import parse_row
from halfbyte.data.problems import Problems, RowError
from halfbyte.data.reading import Reading, Tally
from halfbyte.data.rows import Origin, read_rows
from halfbyte.data.sources import Sources
from halfbyte.data.store import StoreBuilder
from halfbyte.data.text_files import encode_text_file
from halfbyte.errors import (
    DataError,
    FormatError,
    HalfbyteError,
    UnsafeArtifactError,
    UsageError,
)

ROWS_TOGETHER = 256
"""Rows tokenized at once."""

NO_CHARACTER = "half of a surrogate pair (\\ud800 ... \\udfff) in its text"

Progress = Callable[[int], None]
"""Called now and then with the number of rows read so far."""

_Row = tuple[Origin | str, Example | RowError]
"""A place, and what stands there; only of a fault it may be a whole file."""


@dataclass(slots=True, kw_only=True)
class _FaultsInOrder(Problems):
    """Puts faults among the rows that wait."""

    waiting: list[_Row]

    def add(self, where: object, what: str) -> None:
        self.waiting.append((str(where), RowError(what)))


def examples(
    sources: Sources, detector: FormatDetector, problems: Problems
) -> Iterator[tuple[Origin, Example | RowError]]:
    """The rows of all files as examples, or what is wrong with them, with their places."""
    rows = (row for file in sources.files for row in read_rows(file, problems))
    for row, choice in detector.settle(rows):
        try:
            example: Example | RowError = parse_row(row.fields, choice)
        except RowError as error:
            example = error
        yield row.origin, example


class Reader:
    """Reads one data set.

    Rows wait until there are enough of them to be tokenized together; faults found in between
    wait with them, so that all are reported in the order of the files.
    """

    def __init__(self, encoder: Encoder, options: DataOptions) -> None:
        self._encoder = encoder
        self._options = options
        self._problems = Problems()
        self._waiting: list[_Row] = []
        self._builder = StoreBuilder()
        self._digest = hashlib.sha256()
        self._overlong = Tally()
        self._num_lost_tokens = 0
        self._cut = Tally()
        self._unseparated = Tally()

    def read_texts(self, sources: Sources) -> Reading:
        """Plain text files."""
        if self._options.format not in {None, Format.TEXT}:
            self._problems.add(
                sources.files[0].name, f"plain text is not in the format {self._options.format}"
            )
        for file in sources.files:
            self._digest.update(b"file\n")
            ids = encode_text_file(file, self._encoder, self._digest.update, self._problems)
            if ids:
                self._add_cut(ids, Origin(file.name, 0, "token"), row_digest=0, prompt=0)
        return self._reading(sources, None, (), len(sources.files))

    def read_rows(self, sources: Sources, progress: Progress | None) -> Reading:
        """Rows of any kind of file."""
        faults = _FaultsInOrder(waiting=self._waiting)
        detector = FormatDetector(self._options.format, faults)
        num_rows = 0
        for origin, example in examples(sources, detector, faults):
            num_rows += 1
            self._waiting.append((origin, example))
            if len(self._waiting) >= ROWS_TOGETHER:
                self._tokenize_waiting()
                if progress:
                    progress(num_rows)
        self._tokenize_waiting()
        if not num_rows and not self._problems.count:
            self._problems.add(sources.files[0].name, "no rows")
        return self._reading(sources, detector.choice, tuple(detector.ignored), num_rows)

    def read_row(self, sources: Sources, wanted: int | str) -> Reading:
        """A single row; see `read.read_one`."""
        faults = _FaultsInOrder(waiting=self._waiting)
        detector = FormatDetector(self._options.format, faults)
        num_rows = 0
        for origin, example in examples(sources, detector, faults):
            num_rows += 1
            if wanted in {num_rows, str(origin)}:
                # Faults of the rows before it are not asked for.
                self._waiting[:] = [(origin, example)]
                break
        self._tokenize_waiting()
        return self._reading(sources, detector.choice, tuple(detector.ignored), num_rows)

    def _tokenize_waiting(self) -> None:
        rows = [(place, example, _content(example)) for place, example in self._waiting]
        self._waiting.clear()
        usable = [one for _, one, content in rows if not isinstance(one, RowError) and content]
        try:
            encoded = iter(self._encoder.encode(usable))
        except UnsafeArtifactError as error:
            raise _at(f"{rows[0][0]} to {rows[-1][0]}", error) from error
        for place, example, content in rows:
            if isinstance(example, RowError) or isinstance(place, str):
                self._problems.add(place, str(example))
            elif not content:
                self._problems.add(
                    place, "half of a surrogate pair (\\ud800 ... \\udfff) in its text"
                )
            else:
                self._add_or_report(place, example, next(encoded), content)

    def _add_or_report(
        self, origin: Origin, example: Example, encoded: Encoded | HalfbyteError, content: bytes
    ) -> None:
        try:
            if isinstance(encoded, HalfbyteError):
                raise encoded
            self._add(origin, example, encoded, content)
        except UnsafeArtifactError as error:
            raise _at(str(origin), error) from error
        except (DataError, FormatError, UsageError) as error:
            self._problems.add(origin, error.message)

    def _add(self, origin: Origin, example: Example, encoded: Encoded, content: bytes) -> None:
        self._digest.update(content + b"\n")
        row_digest, prompt = digest64(content), prompt_digest(example)
        if isinstance(example, Document):
            self._add_cut(encoded.ids, origin, row_digest=row_digest, prompt=prompt)
            return
        if isinstance(example, RawPair) and _run_together(example):
            self._unseparated.add(origin)
        if fitting := self._fitted(origin, encoded):
            if not any(fitting.trained[1:]):
                raise RowError(self._why_no_target(encoded))
            self._builder.add(
                fitting.ids, fitting.trained, origin, row_digest=row_digest, prompt_digest=prompt
            )

    def _add_cut(self, ids: Sequence[int], origin: Origin, *, row_digest: int, prompt: int) -> None:
        pieces = self._builder.add_cut(
            ids, self._options.max_length, origin, row_digest=row_digest, prompt_digest=prompt
        )
        if pieces > 1:
            self._cut.add(origin)

    def _fitted(self, origin: Origin, encoded: Encoded) -> Encoded | None:
        """The example within the maximum length; None when it is to be left out."""
        limit = self._options.max_length
        length = len(encoded.ids)
        if length <= limit:
            return encoded
        self._overlong.add(f"{origin} ({length} tokens)")
        match self._options.overlong:
            case Overlong.REFUSE:
                raise RowError(f"{length} tokens, more than data.max_length = {limit}")
            case Overlong.DROP:
                self._num_lost_tokens += length
                return None
            case Overlong.TRUNCATE:
                self._num_lost_tokens += length - limit
                return Encoded(encoded.ids[:limit], encoded.trained[:limit])

    def _why_no_target(self, encoded: Encoded) -> str:
        if any(encoded.trained[1:]):
            return f"no trained token within data.max_length = {self._options.max_length}"
        return "no trained token"

    def _reading(
        self,
        sources: Sources,
        choice: FormatChoice | None,
        ignored_fields: tuple[str, ...],
        num_rows: int,
    ) -> Reading:
        store = self._builder.build()
        return Reading(
            options=self._options,
            dataset=Dataset(store, np.arange(len(store.starts), dtype=np.int64)),
            sources=sources,
            choice=choice,
            ignored_fields=ignored_fields,
            num_rows=num_rows,
            fingerprint=self._digest.hexdigest(),
            overlong=self._overlong,
            num_lost_tokens=self._num_lost_tokens,
            cut=self._cut,
            unseparated=self._unseparated,
            problems=self._problems,
        )


def _content(example: Example | RowError) -> bytes:
    """The canonical content; empty for a fault, and for text that no tokenizer takes."""
    if isinstance(example, RowError):
        return b""
    try:
        return canonical(example)
    except UnicodeEncodeError:
        return b""


def _at(place: str, error: UnsafeArtifactError) -> UnsafeArtifactError:
    return UnsafeArtifactError(f"{place}: {error.message}", hint=error.hint)


def _run_together(pair: RawPair) -> bool:
    if not pair.prompt_text:
        return False
    return not pair.prompt_text[-1].isspace() and not pair.completion[0].isspace()

"""Read a data set: files, rows, examples, tokens, and everything there is to say about them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from halfbyte.data.dataset import Dataset
from halfbyte.data.encode import Encoded, Encoder, Tokenizer
from halfbyte.data.examples import Document, Example, RawPair, canonical, digest64, prompt_digest
from halfbyte.data.formats import Format, FormatChoice, FormatDetector
from halfbyte.data.options import DataOptions, Overlong
from halfbyte.data.parse import parse_row
from halfbyte.data.problems import Problems, RowError
from halfbyte.data.rows import Origin, read_rows
from halfbyte.data.sources import Kind, Sources, find_sources
from halfbyte.data.store import StoreBuilder
from halfbyte.data.text_files import encode_text_file
from halfbyte.errors import UnsafeArtifactError, UsageError

SHOWN = 5
"""Places named in a notice; the rest are counted."""

Progress = Callable[[int], None]
"""Called now and then with the number of rows read so far."""


@dataclass(slots=True)
class Tally:
    """Rows to which something happened: all counted, the first ones named."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, what: object) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(str(what))

    def __str__(self) -> str:
        more = f" and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return ", ".join(self.first) + more


@dataclass(frozen=True, slots=True)
class Reading:
    """A data set as it was found.

    Attributes:
        options: How it was read.
        dataset: The documents that can be used.
        sources: The files.
        choice: The row format and why; None for plain text files or when none was found.
        ignored_fields: Fields of the rows that are not read.
        num_rows: Rows found, or plain text files; those with problems included.
        fingerprint: sha256 over the content of the rows in order, whatever the file kind.
        overlong: Rows of more than the maximum length (refused, truncated or dropped).
        num_lost_tokens: Tokens that truncating or dropping took away.
        cut: Texts of more than the maximum length, used whole in several documents.
        unseparated: Raw pairs with no space between prompt and completion.
        problems: What is wrong; training refuses a data set that has any.
    """

    options: DataOptions
    dataset: Dataset
    sources: Sources
    choice: FormatChoice | None
    ignored_fields: tuple[str, ...]
    num_rows: int
    fingerprint: str
    overlong: Tally
    num_lost_tokens: int
    cut: Tally
    unseparated: Tally
    problems: Problems

    def notices(self) -> list[str]:
        """What a user should know before training, a sentence each."""
        found = []
        limit = self.options.max_length
        if self.overlong.count and self.options.overlong is not Overlong.REFUSE:
            verb = "truncated" if self.options.overlong is Overlong.TRUNCATE else "dropped"
            found.append(
                f"{self.overlong.count} of {self.num_rows} rows are longer than {limit} tokens "
                f"and were {verb} ({self.num_lost_tokens} tokens lost): {self.overlong}"
            )
        if self.cut.count:
            found.append(
                f"{self.cut.count} of {self.num_rows} texts are longer than {limit} tokens "
                f"and were cut into several documents, with nothing lost: {self.cut}"
            )
        if self.unseparated.count:
            found.append(
                f"in {self.unseparated.count} of {self.num_rows} rows the prompt does not end, "
                "nor the completion begin, with a space or line break, so the two run together: "
                f"{self.unseparated}"
            )
        if self.ignored_fields:
            found.append(f"fields that are not used: {', '.join(self.ignored_fields)}")
        if self.sources.ignored:
            found.append(f"files of unknown kind, not read: {', '.join(self.sources.ignored)}")
        return found


def load_dataset(
    location: str | Path,
    tokenizer: Tokenizer,
    options: DataOptions,
    *,
    progress: Progress | None = None,
) -> Reading:
    """Read a data set that is to be trained on.

    Raises:
        DataError: Rows cannot be used; every one is named, up to a limit.
        MissingFileError: Nothing is at `location`.
    """
    reading = read_dataset(location, tokenizer, options, progress=progress)
    reading.problems.raise_if_any(f"cannot train on {location}", hint=_hint(reading))
    return reading


def read_dataset(
    location: str | Path,
    tokenizer: Tokenizer,
    options: DataOptions,
    *,
    progress: Progress | None = None,
) -> Reading:
    """Read what can be read of a data set, and collect what is wrong with the rest.

    Raises:
        DataError: The files are of unknown or several kinds.
        MissingFileError: Nothing is at `location`.
    """
    sources = find_sources(location)
    reader = _Reader(Encoder(tokenizer, train_on_prompt=options.train_on_prompt), options)
    if sources.files[0].kind is Kind.TEXT:
        return reader.read_texts(sources)
    return reader.read_rows(sources, progress)


def read_one(
    location: str | Path, tokenizer: Tokenizer, options: DataOptions, wanted: int | str
) -> Reading:
    """Read a single row the way `read_dataset` does: its `dataset` holds that row only.

    Args:
        location: The data set.
        tokenizer: Of the model.
        options: As for training.
        wanted: The row's number from 1 over all files, or its place as messages name it.
            Of plain text files, the number or place of a document.

    Raises:
        DataError: The row cannot be used.
        UsageError: There is no such row.
    """
    sources = find_sources(location)
    reader = _Reader(Encoder(tokenizer, train_on_prompt=options.train_on_prompt), options)
    if sources.files[0].kind is Kind.TEXT:
        reading = _only(reader.read_texts(sources), wanted)
    else:
        reading = reader.read_row(sources, wanted)
    reading.problems.raise_if_any(f"cannot train on row {wanted} of {location}")
    if not len(reading.dataset):
        raise UsageError(
            f"{location}: no row {wanted} to show, it has {reading.num_rows} rows"
            if not reading.overlong.count
            else f"{location}: row {wanted} is left out: {reading.overlong}"
        )
    return reading


def _only(reading: Reading, wanted: int | str) -> Reading:
    dataset = reading.dataset
    index = [
        document
        for document in range(len(dataset))
        if wanted in {document + 1, str(dataset.origin(document))}
    ]
    return replace(
        reading,
        dataset=Dataset(dataset.store, np.asarray(index, dtype=np.int64)),
        num_rows=len(dataset),
    )


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


class _Reader:
    def __init__(self, encoder: Encoder, options: DataOptions) -> None:
        self._encoder = encoder
        self._options = options
        self._problems = Problems()
        self._builder = StoreBuilder()
        self._digest = hashlib.sha256()
        self._overlong = Tally()
        self._num_lost_tokens = 0
        self._cut = Tally()
        self._unseparated = Tally()

    def read_texts(self, sources: Sources) -> Reading:
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
        detector = FormatDetector(self._options.format, self._problems)
        num_rows = 0
        for origin, example in examples(sources, detector, self._problems):
            num_rows += 1
            if progress and num_rows % 256 == 0:
                progress(num_rows)
            self._add_or_report(origin, example)
        if not num_rows and not self._problems.count:
            self._problems.add(sources.files[0].name, "no rows")
        return self._reading(sources, detector.choice, tuple(detector.ignored), num_rows)

    def read_row(self, sources: Sources, wanted: int | str) -> Reading:
        detector = FormatDetector(self._options.format, self._problems)
        num_rows = 0
        for origin, example in examples(sources, detector, self._problems):
            num_rows += 1
            if wanted in {num_rows, str(origin)}:
                self._problems = Problems()  # those of the rows before are not asked for
                self._add_or_report(origin, example)
                break
        return self._reading(sources, detector.choice, tuple(detector.ignored), num_rows)

    def _add_or_report(self, origin: Origin, example: Example | RowError) -> None:
        try:
            if isinstance(example, RowError):
                raise example
            self._add(origin, example)
        except RowError as error:
            self._problems.add(origin, error.message)
        except UnsafeArtifactError as error:
            raise UnsafeArtifactError(f"{origin}: {error.message}", hint=error.hint) from error

    def _add(self, origin: Origin, example: Example) -> None:
        content = _content(example)
        encoded = self._encoder.encode(example)
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


def _content(example: Example) -> bytes:
    try:
        return canonical(example)
    except UnicodeEncodeError as error:
        raise RowError("half of a surrogate pair (\\ud800 ... \\udfff) in its text") from error


def _run_together(pair: RawPair) -> bool:
    if not pair.prompt_text:
        return False
    return not pair.prompt_text[-1].isspace() and not pair.completion[0].isspace()


def _hint(reading: Reading) -> str:
    if not reading.overlong.count or reading.options.overlong is not Overlong.REFUSE:
        return ""
    return (
        f"{reading.overlong.count} rows are too long: raise data.max_length, or set "
        "data.overlong to truncate (cuts the end of the answer off) or drop."
    )

"""Read a data set: what training, checking and showing call."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from halfbyte.data.dataset import Dataset
from halfbyte.data.encode import Encoder, Tokenizer
from halfbyte.data.options import DataOptions, Overlong
from halfbyte.data.reader import Progress, Reader
from halfbyte.data.reading import Reading
from halfbyte.data.sources import Kind, find_sources
from halfbyte.errors import UsageError


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
    reader = Reader(Encoder(tokenizer, train_on_prompt=options.train_on_prompt), options)
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
    reader = Reader(Encoder(tokenizer, train_on_prompt=options.train_on_prompt), options)
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


def _hint(reading: Reading) -> str:
    if not reading.overlong.count or reading.options.overlong is not Overlong.REFUSE:
        return ""
    return (
        f"{reading.overlong.count} rows are too long: raise data.max_length, or set "
        "data.overlong to truncate (cuts the end of the answer off) or drop."
    )

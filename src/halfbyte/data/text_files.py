"""Plain text files as streams: one file, one text, cut only at the maximum length.

A file is read and tokenized in portions, so that its size does not matter. Portions end where
tokenizers split anyway, so that the tokens are those of the whole text.
"""

from array import array
from collections.abc import Callable, Iterator

from halfbyte.data.encode import Encoder
from halfbyte.data.json_text import BadLineError
from halfbyte.data.problems import Problems
from halfbyte.data.rows import Origin, decode_line
from halfbyte.data.sources import DamagedFileError, DataFile, open_bytes

PORTION_CHARACTERS = 1 << 20


def encode_text_file(
    file: DataFile, encoder: Encoder, digest: Callable[[bytes], None], problems: Problems
) -> "array[int]":
    """Tokens of a whole file, its end token last; empty when it cannot be read or is empty.

    Args:
        file: A plain text file.
        encoder: Makes the tokens.
        digest: Takes the text, for the fingerprint of the data.
        problems: Takes what is wrong with the file.
    """
    ids = array("i", encoder.begin)
    empty = True
    try:
        for portion in _portions(file):
            digest(portion.encode())
            ids.extend(encoder.encode_text(portion))
            empty = empty and not portion.strip()
    except DamagedFileError as error:
        problems.add(file.name, error.message)
    except BadLineError as error:
        problems.add(Origin(file.name, error.line), error.message)
    if empty:
        problems.add(file.name, "no text")
        return array("i")
    ids.extend(encoder.end)
    return ids


def _portions(file: DataFile) -> Iterator[str]:
    pending: list[str] = []
    size = 0
    previous = ""
    with open_bytes(file) as stream:
        for number, raw in enumerate(stream, start=1):
            line = decode_line(raw, number)
            if size >= PORTION_CHARACTERS and _splits_here(previous, line):
                yield "".join(pending)
                pending, size = [], 0
            pending.append(line)
            size += len(line)
            previous = line
    if pending:
        yield "".join(pending)


def _splits_here(before: str, after: str) -> bool:
    """Whether byte-level tokenizers (GPT-2's and its successors) split between two lines.

    They make a space part of the word behind it, and a line break a token of its own only
    when it stands alone.
    """
    if after[0] == " ":
        return not after[1:2].isspace()
    alone = len(before) > 1 and not before[-2].isspace()
    return alone and not after[0].isspace()

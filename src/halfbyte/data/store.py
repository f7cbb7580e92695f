"""All documents of a data set as tokens, in flat arrays: 5 bytes a token, 44 a document."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.rows import Origin


@dataclass(frozen=True, eq=False)
class TokenStore:
    """D documents in N tokens.

    Document d holds the tokens from `starts[d]` to `ends[d]`. What position i predicts is
    token i + 1, and only where `has_target[i]` is set. The last token of a document has no
    target, except where a longer text was cut: there the text goes on behind it.

    Attributes:
        tokens: int32 `[N]`.
        has_target: bool `[N]`; whether the token *after* this one is to be predicted here.
        starts: int64 `[D]`, increasing.
        ends: int64 `[D]`.
        files: Names of the files.
        file_of: int32 `[D]`; index into `files`.
        number_of: int64 `[D]`; line, row or token where the document begins.
        units: `line`, `row` or `token`, for each file.
        row_digests: uint64 `[D]`; equal for documents of the same content.
        prompt_digests: uint64 `[D]`; equal for documents with the same prompt.
    """

    tokens: NDArray[np.int32]
    has_target: NDArray[np.bool_]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    files: tuple[str, ...]
    units: tuple[str, ...]
    file_of: NDArray[np.int32]
    number_of: NDArray[np.int64]
    row_digests: NDArray[np.uint64]
    prompt_digests: NDArray[np.uint64]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64 `[D]`; tokens of each document."""
        return self.ends - self.starts

    @cached_property
    def num_targets(self) -> NDArray[np.int64]:
        """int64 `[D]`; targets of each document."""
        before = np.concatenate([[0], np.cumsum(self.has_target, dtype=np.int64)])
        return np.asarray(before[self.ends] - before[self.starts], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over tokens, targets and boundaries: what training sees of the data."""
        digest = hashlib.sha256()
        for part, dtype in (
            (self.tokens, "<i4"),
            (self.has_target, "|b1"),
            (self.starts, "<i8"),
            (self.ends, "<i8"),
        ):
            digest.update(str(part.size).encode())
            digest.update(np.ascontiguousarray(part, dtype=dtype).data)
        return digest.hexdigest()

    def origin(self, document: int) -> Origin:
        """Where a document came from."""
        file = int(self.file_of[document])
        return Origin(self.files[file], int(self.number_of[document]), self.units[file])


class StoreBuilder:
    """Collects documents into a `TokenStore`."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._has_target = bytearray()
        self._starts = array("q")
        self._ends = array("q")
        self._files: dict[str, tuple[int, str]] = {}
        self._file_of = array("i")
        self._number_of = array("q")
        self._row_digests = array("Q")
        self._prompt_digests = array("Q")

    def add(
        self,
        ids: Sequence[int],
        trained: Sequence[bool],
        origin: Origin,
        *,
        row_digest: int,
        prompt_digest: int,
    ) -> None:
        """Add one whole document."""
        start = len(self._tokens)
        self._tokens.extend(ids)
        self._has_target.extend(trained[1:])
        self._has_target.append(False)
        self._add_document(start, len(self._tokens), origin, row_digest, prompt_digest)

    def add_cut(
        self,
        ids: Sequence[int],
        max_length: int,
        origin: Origin,
        *,
        row_digest: int,
        prompt_digest: int,
    ) -> int:
        """Add running text, every token a target, as pieces of at most `max_length`.

        Every token but the first is predicted exactly once, also across a cut. Pieces of a
        file of its own (`origin` counts tokens) have their own origins and digests.

        Returns:
            The number of pieces.
        """
        begin = len(self._tokens)
        self._tokens.extend(ids)
        self._has_target.extend(b"\x01" * (len(ids) - 1) + b"\x00")
        # The last token predicts nothing, so it begins no piece of its own.
        starts = range(begin, max(begin + 1, len(self._tokens) - 1), max_length)
        for start in starts:
            end = min(start + max_length, len(self._tokens))
            if origin.unit == "token":
                place = Origin(origin.file, start - begin, origin.unit)
                content = self._tokens[start:end].tobytes()
                digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
                self._add_document(start, end, place, digest, digest)
            else:
                self._add_document(start, end, origin, row_digest, prompt_digest)
        return len(starts)

    def _add_document(
        self, start: int, end: int, origin: Origin, row_digest: int, prompt_digest: int
    ) -> None:
        index, _ = self._files.setdefault(origin.file, (len(self._files), origin.unit))
        self._starts.append(start)
        self._ends.append(end)
        self._file_of.append(index)
        self._number_of.append(origin.number)
        self._row_digests.append(row_digest)
        self._prompt_digests.append(prompt_digest)

    def build(self) -> TokenStore:
        """The documents so far, over the same memory. The builder must not be used again."""
        return TokenStore(
            tokens=np.frombuffer(self._tokens, dtype=np.int32),
            has_target=np.frombuffer(self._has_target, dtype=np.bool_),
            starts=np.frombuffer(self._starts, dtype=np.int64),
            ends=np.frombuffer(self._ends, dtype=np.int64),
            files=tuple(self._files),
            units=tuple(unit for _, unit in self._files.values()),
            file_of=np.frombuffer(self._file_of, dtype=np.int32),
            number_of=np.frombuffer(self._number_of, dtype=np.int64),
            row_digests=np.frombuffer(self._row_digests, dtype=np.uint64),
            prompt_digests=np.frombuffer(self._prompt_digests, dtype=np.uint64),
        )

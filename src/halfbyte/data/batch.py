"""What the model is given: documents side by side in one flat row of tokens, no padding.

Dimension key:
    T  tokens, packed
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfbyte.data.dataset import Dataset
from halfbyte.data.parse import NO_TARGET
from halfbyte.errors import DataError
from halfbyte.formats.checks import describe
from halfbyte.layers.segments import Segments
from halfbyte.layers.segments import pack as pack_segments


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One micro-batch of T tokens. Valid once built.

    Attributes:
        tokens: int64 `[T]`.
        targets: int64 `[T]`, already shifted: entry i is the token that follows position i in
            its document if that one carries loss, else -100. The last token of a document has
            none, except where a longer text was cut: its target is the first token after.
        segments: Boundaries of the documents, positions counted from 0 in each.
        rows: Where each document came from, as in `train.jsonl:12`.
    """

    tokens: Tensor
    targets: Tensor
    segments: Segments
    rows: tuple[str, ...]

    def __post_init__(self) -> None:
        problems = []
        expected = (self.segments.num_tokens,)
        for name, value in (("tokens", self.tokens), ("targets", self.targets)):
            if value.dtype != torch.int64 or tuple(value.shape) != expected:
                problems.append(f"{name}: int64 {list(expected)} expected, found {describe(value)}")
        if len(self.rows) != self.segments.num_segments:
            problems.append(f"rows: {self.segments.num_segments} expected, found {len(self.rows)}")
        if problems:
            raise DataError("not a batch", problems=problems)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Positions with a target."""
        return int((self.targets != NO_TARGET).sum())


def build_batch(dataset: Dataset, documents: Sequence[int]) -> Batch:
    """Lay documents of a data set side by side."""
    store = dataset.store
    numbers = dataset.index[np.asarray(documents, dtype=np.int64)]
    bounds = [(int(store.starts[n]), int(store.ends[n])) for n in numbers]
    tokens = np.concatenate([store.tokens[begin:end] for begin, end in bounds])
    has_target = np.concatenate([store.has_target[begin:end] for begin, end in bounds])
    # The very last token of a store has no follower and no target: any value will do for it.
    followers = np.concatenate([_followers(store.tokens, begin, end) for begin, end in bounds])
    return Batch(
        tokens=torch.from_numpy(tokens.astype(np.int64)),
        targets=torch.from_numpy(np.where(has_target, followers, NO_TARGET).astype(np.int64)),
        segments=pack_segments([end - begin for begin, end in bounds]),
        rows=tuple(str(store.origin(int(number))) for number in numbers),
    )


def _followers(
    tokens: "np.ndarray[tuple[int], np.dtype[np.int32]]", begin: int, end: int
) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    following = tokens[begin + 1 : end + 1]
    return following if len(following) == end - begin else np.append(following, np.int32(0))


def evaluation_batches(dataset: Dataset, micro_batch_tokens: int) -> Iterator[Batch]:
    """All documents once in reading order, in batches of at most `micro_batch_tokens`.

    Raises:
        DataError: A document is longer than a batch.
    """
    lengths = dataset.lengths.tolist()
    for document, length in enumerate(lengths):
        if length > micro_batch_tokens:
            raise DataError(
                f"{dataset.origin(document)}: {length} tokens, more than "
                f"training.micro_batch_tokens = {micro_batch_tokens}"
            )
    for documents in evaluated_together(lengths, micro_batch_tokens):
        yield build_batch(dataset, documents)


def evaluated_together(lengths: Sequence[int], micro_batch_tokens: int) -> Iterator[range]:
    """Documents of each batch of an evaluation, from their lengths, none above the budget."""
    first = used = 0
    for document, length in enumerate(lengths):
        if used + length > micro_batch_tokens:
            yield range(first, document)
            first, used = document, 0
        used += length
    if used:
        yield range(first, len(lengths))

"""The documents that one purpose uses (training, evaluation), and how they are divided."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.rows import Origin
from halfbyte.data.store import TokenStore
from halfbyte.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Dataset:
    """A selection of D documents of a store, numbered from 0 in reading order.

    Attributes:
        store: The tokens, shared by all selections.
        index: int64 `[D]`; the document's number in the store.
    """

    store: TokenStore
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64 `[D]`; tokens of each document."""
        return self.store.lengths[self.index]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return int(self.lengths.sum())

    @property
    def num_targets(self) -> int:
        """Tokens with loss, of all documents together."""
        return int(self.store.num_targets[self.index].sum())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over what training sees: tokens, targets, boundaries, selection."""
        digest = sha256(self.store.fingerprint.encode())
        digest.update(np.ascontiguousarray(self.index, dtype="<i8").data)
        return digest.hexdigest()

    def origin(self, document: int) -> Origin:
        """Where a document came from."""
        return self.store.origin(int(self.index[document]))

    def longest(self) -> tuple[Origin, int]:
        """The place and the length of the longest document, the first of several.

        Raises:
            DataError: There is no document.
        """
        if not len(self):
            raise DataError("the data set has no documents")
        document = int(self.lengths.argmax())
        return self.origin(document), int(self.lengths[document])

    def num_duplicates(self) -> int:
        """Documents whose content occurred before."""
        return len(self) - len(np.unique(self.store.row_digests[self.index]))


def num_with_shared_prompts(held_out: Dataset, train: Dataset) -> int:
    """Documents that are held out although the training data has their prompt."""
    left = held_out.store.prompt_digests[held_out.index]
    return int(np.isin(left, train.store.prompt_digests[train.index]).sum())


def split_by_prompt(dataset: Dataset, eval_fraction: float) -> tuple[Dataset, Dataset]:
    """Divide into training and evaluation, documents that share a prompt on the same side.

    Prompts stand in the order of their hashes, and the first ones are evaluated until they
    hold `eval_fraction` of the documents. This depends on no seed, so runs compare on the
    same documents, and adding rows moves few of the old ones.

    Raises:
        ConfigError: The fraction is not between 0 and 1.
        DataError: There are fewer than two different prompts.
    """
    if not 0 < eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction: between 0 and 1 expected, found {eval_fraction}")
    prompts, prompt_of, counts = np.unique(
        dataset.store.prompt_digests[dataset.index], return_inverse=True, return_counts=True
    )
    if len(prompts) < 2:  # noqa: PLR2004  (one for each side)
        raise DataError(
            f"data.eval_fraction needs two different prompts, found {len(prompts)}",
            hint="Give a file of its own as data.eval.",
        )
    enough = int(np.searchsorted(np.cumsum(counts), eval_fraction * len(dataset))) + 1
    evaluated = prompt_of < min(enough, len(prompts) - 1)
    return (
        Dataset(dataset.store, dataset.index[~evaluated]),
        Dataset(dataset.store, dataset.index[evaluated]),
    )

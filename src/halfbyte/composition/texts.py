"""Texts to calibrate on and to probe with: ours, or the user's data in any format we train on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.data.batch import Batch, build_batch
from halfbyte.data.dataset import Dataset
from halfbyte.data.formats import Format
from halfbyte.data.options import DataOptions, Overlong
from halfbyte.data.read import load_dataset
from halfbyte.errors import DataError
from halfbyte.text.tokenizer import Tokenizer

OWN_PROBE = Path(__file__).parent / "probe.jsonl"
OWN_CALIBRATION = Path(__file__).parent / "calibration.jsonl"

MAX_DOCUMENT_TOKENS = 512
BATCH_TOKENS = 1024
MAX_CALIBRATION_TOKENS = 16_384
MAX_PROBE_TOKENS = 8_192
_ORDER_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Documents of one purpose.

    Attributes:
        name: Where they come from.
        dataset: The documents.
    """

    name: str
    dataset: Dataset

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return self.dataset.num_tokens

    @property
    def num_targets(self) -> int:
        """Of all documents."""
        return self.dataset.num_targets

    def without(self, other: "Text") -> "Text":
        """The documents that `other` does not have."""
        mine = self.dataset.store.row_digests[self.dataset.index]
        theirs = other.dataset.store.row_digests[other.dataset.index]
        index = self.dataset.index[~np.isin(mine, theirs)]
        return Text(self.name, Dataset(self.dataset.store, index))

    def limited(self, max_tokens: int) -> "Text":
        """As many documents as hold at most so many tokens, drawn evenly, always the same ones."""
        order = np.random.default_rng(_ORDER_SEED).permutation(len(self.dataset))
        fits = np.cumsum(self.dataset.lengths[order]) <= max_tokens
        fits[:1] = True
        chosen = np.sort(order[fits])
        return Text(self.name, Dataset(self.dataset.store, self.dataset.index[chosen]))

    def batches(self) -> list[Batch]:
        """The documents side by side, `BATCH_TOKENS` at a time."""
        found: list[list[int]] = [[]]
        used = 0
        for document, length in enumerate(self.dataset.lengths.tolist()):
            if found[-1] and used + length > BATCH_TOKENS:
                found.append([])
                used = 0
            found[-1].append(document)
            used += length
        return [build_batch(self.dataset, documents) for documents in found]


def read_text(
    location: str | Path | None, own: Path, tokenizer: Tokenizer, data_format: Format | None
) -> Text:
    """Read a text; loss is on answers only where there are questions.

    Args:
        location: A file, folder or glob in any format that can be trained on; None for `own`.
        own: Our text.
        tokenizer: Of the model.
        data_format: How rows at `location` are read; None means found from their fields.

    Raises:
        DataError: Rows cannot be used, or there are none.
        MissingFileError: Nothing is at `location`.
    """
    options = DataOptions(
        format=None if location is None else data_format,
        max_length=MAX_DOCUMENT_TOKENS,
        overlong=Overlong.TRUNCATE,
        train_on_prompt=False,
    )
    dataset = load_dataset(own if location is None else location, tokenizer, options).dataset
    name = "halfbyte's own text" if location is None else str(location)
    if not len(dataset) or not dataset.num_targets:
        raise DataError(f"{name}: at least one document with a target expected, found none")
    return Text(name, dataset)


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """What one merge reads.

    Attributes:
        probe: To be judged by.
        calibration: To choose codes on; shares no document with the probe.
        notes: What the user should know.
    """

    probe: Text
    calibration: Text
    notes: tuple[str, ...]

    @classmethod
    def read(
        cls,
        model: Path,
        calibration: str | Path | None,
        probe: str | Path | None,
        data_format: Format | None = None,
    ) -> "Texts":
        """Read both, or take our own.

        Raises:
            MissingFileError: The model has no tokenizer, or nothing is at a location.
            DataError: Rows cannot be used, or all of the calibration is in the probe.
        """
        tokenizer = Tokenizer.load(model)
        judge = read_text(probe, OWN_PROBE, tokenizer, data_format).limited(MAX_PROBE_TOKENS)
        whole = read_text(calibration, OWN_CALIBRATION, tokenizer, data_format)
        rest = whole.without(judge)
        if not len(rest.dataset):
            raise DataError(
                f"{whole.name}: all its documents are in the probe {judge.name}",
                hint="Calibrate on other documents than those that the result is judged by.",
            )
        notes = []
        if shared := len(whole.dataset) - len(rest.dataset):
            notes.append(f"{shared} documents of {whole.name} are in the probe, and left out")
        return cls(judge, rest.limited(MAX_CALIBRATION_TOKENS), tuple(notes))

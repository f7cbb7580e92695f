"""The data of a run: read once, split, and known by fingerprint."""

from dataclasses import dataclass

from halfbyte.data.dataset import Dataset, split_by_prompt
from halfbyte.data.read import load_dataset
from halfbyte.data.reading import Reading
from halfbyte.errors import ConfigError
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.training.config import Config
from halfbyte.training.data_options import data_options


@dataclass(frozen=True, slots=True, eq=False)
class RunData:
    """What a run learns from and what it is judged by.

    Attributes:
        train: Documents to learn from.
        held_out: Documents to evaluate on, or None.
        reading: How the training data was found and read.
        notices: What a user should know, a sentence each.
        tokenizer: Its fingerprint. Making it takes several times the tokenizer's file, 240 MB with
            262,144 tokens: rather now, when there is room, than at the end.
    """

    train: Dataset
    held_out: Dataset | None
    reading: Reading
    notices: tuple[str, ...]
    tokenizer: str


def open_run_data(config: Config, tokenizer: Tokenizer) -> RunData:
    """Read, tokenize and split the data of a config.

    Raises:
        ConfigError: Samples are wanted, and nothing is held out.
        DataError: Rows cannot be used; every one is named, up to a limit.
        MissingFileError: Nothing is there.
    """
    options = data_options(config.data)
    reading = load_dataset(config.data.train, tokenizer, options)
    notices = tuple(reading.notices())
    fingerprint = tokenizer.fingerprint
    if config.data.eval is not None:
        held_out = load_dataset(config.data.eval, tokenizer, options)
        notices += tuple(held_out.notices())
        return RunData(reading.dataset, held_out.dataset, reading, notices, fingerprint)
    if config.data.eval_fraction == 0:
        if config.training.num_samples:
            raise ConfigError(
                f"training.num_samples = {config.training.num_samples}: held-out data expected, "
                "found none",
                hint="Give data.eval, or a data.eval_fraction above 0.",
            )
        return RunData(reading.dataset, None, reading, notices, fingerprint)
    train, evaluation = split_by_prompt(reading.dataset, config.data.eval_fraction)
    return RunData(train, evaluation, reading, notices, fingerprint)

"""How a data set is read: the settings of the config's `data` section that change its tokens."""

from dataclasses import dataclass
from enum import StrEnum

from halfbyte.data.formats import Format
from halfbyte.errors import ConfigError


class Overlong(StrEnum):
    """What happens to an example of more than `max_length` tokens. Running text is cut instead."""

    REFUSE = "refuse"
    TRUNCATE = "truncate"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class DataOptions:
    """The settings; the config has their defaults. Valid once built.

    Attributes:
        format: The row format; None means found from the rows' fields.
        max_length: Most tokens of a document.
        overlong: For longer examples. A truncated answer has lost its end token and teaches
            the model not to stop, so the config's default is `refuse`: it wants a decision.
        train_on_prompt: Put loss on every token, not only on those of the answer.
    """

    format: Format | None
    max_length: int
    overlong: Overlong
    train_on_prompt: bool

    def __post_init__(self) -> None:
        # A document needs a token to predict from and one to predict.
        if self.max_length < 2:  # noqa: PLR2004
            raise ConfigError(f"data.max_length: at least 2 expected, found {self.max_length}")

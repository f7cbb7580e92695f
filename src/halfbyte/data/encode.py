"""From examples to tokens with a loss mask.

Training, checking and showing a data set all go this one way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from halfbyte.data.examples import Conversation, Document, Example, RawPair, TokenRow
from halfbyte.data.problems import RowError
from halfbyte.errors import DataError, FormatError, UsageError


class ChatTokens(Protocol):
    """A conversation as tokens."""

    @property
    def ids(self) -> Sequence[int]:
        """Token numbers."""

    @property
    def trained(self) -> Sequence[bool]:
        """For each token whether the assistant wrote it, the end of its turn included."""


class Tokenizer(Protocol):
    """What is needed of a model's tokenizer."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text."""

    @property
    def adds_bos(self) -> bool:
        """Whether this model expects `bos_id` before raw text."""

    @property
    def eos_ids(self) -> Sequence[int]:
        """Tokens that end a text, the one to write first."""

    @property
    def vocab_size(self) -> int:
        """Token numbers are below it."""

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """Tokens of a text, special tokens not recognised inside; no `bos_id` if `bos` is False."""

    def encode_chat(self, messages: Sequence[Mapping[str, object]]) -> ChatTokens:
        """A conversation through the model's chat template."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of one example, and for each whether it is to be predicted."""

    ids: Sequence[int]
    trained: Sequence[bool]


class Encoder:
    """Turns examples into tokens.

    Args:
        tokenizer: Of the model that is to be trained.
        train_on_prompt: Put loss on every token, not only on those of the answer.

    Raises:
        DataError: The tokenizer has no end token, so no answer could be taught to end.
    """

    def __init__(self, tokenizer: Tokenizer, *, train_on_prompt: bool) -> None:
        if not tokenizer.eos_ids:
            raise DataError("the model's tokenizer has no end-of-text token")
        self._tokenizer = tokenizer
        self._train_on_prompt = train_on_prompt
        self.begin = (
            [] if not tokenizer.adds_bos or tokenizer.bos_id is None else [tokenizer.bos_id]
        )
        self.end = [tokenizer.eos_ids[0]]

    def encode(self, example: Example) -> Encoded:
        """Tokens of an example.

        Raises:
            RowError: The chat template or the vocabulary does not allow it.
        """
        match example:
            case RawPair(prompt, completion):
                # Apart, so that no token spans the place where the loss begins.
                before = [*self.begin, *self.encode_text(prompt)]
                after = [*self.encode_text(completion), *self.end]
                trained = [self._train_on_prompt] * len(before) + [True] * len(after)
                return Encoded([*before, *after], trained)
            case Document(text):
                ids = [*self.begin, *self.encode_text(text), *self.end]
                return Encoded(ids, [True] * len(ids))
            case TokenRow(ids, trained):
                if (largest := max(ids)) >= self._tokenizer.vocab_size:
                    raise RowError(
                        f"token {largest} is not in the model's vocabulary of "
                        f"{self._tokenizer.vocab_size}: made with another tokenizer?"
                    )
                return self._checked(ids, trained)
            case Conversation(messages):
                return self._conversation(messages)

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a part of a longer text: nothing is put before or after them."""
        return self._tokenizer.encode(text, bos=False)

    def _conversation(self, messages: Sequence[Mapping[str, object]]) -> Encoded:
        try:
            tokens = self._tokenizer.encode_chat(messages)
        except (UsageError, FormatError) as error:
            raise RowError(error.message) from error
        if self._train_on_prompt:
            return self._checked(tokens.ids, [True] * len(tokens.ids))
        return self._checked(tokens.ids, tokens.trained)

    def _checked(self, ids: Sequence[int], trained: Sequence[bool]) -> Encoded:
        bos = self._tokenizer.bos_id
        # Only where BOS stands for nothing else: some models open every chat turn with it.
        if self._tokenizer.adds_bos and len(ids) > 1 and ids[0] == ids[1] == bos:
            raise RowError("two begin-of-text tokens at its start")
        return Encoded(ids, trained)

"""From examples to tokens with a loss mask.

Training, checking and showing a data set all go this one way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from halfbyte.data.examples import Conversation, Document, Example, RawPair, TokenRow
from halfbyte.data.problems import RowError
from halfbyte.errors import DataError, HalfbyteError


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

    def encode_batch(self, texts: Sequence[str]) -> Sequence[list[int]]:
        """Tokens of each text, without `bos_id`, special tokens not recognised inside."""

    def encode_chats(
        self, conversations: Sequence[Sequence[Mapping[str, object]]]
    ) -> Sequence[ChatTokens | HalfbyteError]:
        """Conversations through the model's chat template, or what is wrong with one."""


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

    def encode(self, examples: Sequence[Example]) -> list[Encoded | HalfbyteError]:
        """Tokens of each example, or why the chat template or the vocabulary does not allow it.

        Raises:
            UsageError: The model has no chat template, and an example needs it.
            UnsafeArtifactError: The chat template exceeds its limits.
        """
        texts = dict.fromkeys(text for example in examples for text in _texts(example))
        tokens = dict(zip(texts, self._tokenizer.encode_batch(list(texts)), strict=True))
        conversations = [one.messages for one in examples if isinstance(one, Conversation)]
        chats = iter(self._tokenizer.encode_chats(conversations) if conversations else ())
        results: list[Encoded | HalfbyteError] = []
        for example in examples:
            match example:
                case RawPair(prompt, completion):
                    results.append(self._pair(tokens[prompt], tokens[completion]))
                case Document(text):
                    ids = [*self.begin, *tokens[text], *self.end]
                    results.append(Encoded(ids, [True] * len(ids)))
                case TokenRow():
                    results.append(self._token_row(example))
                case Conversation():
                    results.append(self._conversation(next(chats)))
        return results

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a part of a longer text: nothing is put before or after them."""
        return self._tokenizer.encode_batch([text])[0]

    def _pair(self, prompt: list[int], completion: list[int]) -> Encoded:
        before = [*self.begin, *prompt]
        after = [*completion, *self.end]
        trained = [self._train_on_prompt] * len(before) + [True] * len(after)
        return Encoded([*before, *after], trained)

    def _token_row(self, row: TokenRow) -> Encoded | RowError:
        if (largest := max(row.ids)) >= self._tokenizer.vocab_size:
            return RowError(
                f"token {largest} is not in the model's vocabulary of "
                f"{self._tokenizer.vocab_size}: made with another tokenizer?"
            )
        return self._checked(row.ids, row.trained)

    def _conversation(self, tokens: ChatTokens | HalfbyteError) -> Encoded | HalfbyteError:
        if isinstance(tokens, HalfbyteError):
            return tokens
        trained = [True] * len(tokens.ids) if self._train_on_prompt else tokens.trained
        return self._checked(tokens.ids, trained)

    def _checked(self, ids: Sequence[int], trained: Sequence[bool]) -> Encoded | RowError:
        bos = self._tokenizer.bos_id
        # Only where BOS stands for nothing else: some models open every chat turn with it.
        if self._tokenizer.adds_bos and len(ids) > 1 and ids[0] == ids[1] == bos:
            return RowError("two begin-of-text tokens at its start")
        return Encoded(ids, trained)


def _texts(example: Example) -> Sequence[str]:
    """What is tokenized without a template."""
    match example:
        case RawPair(prompt, completion):
            # Apart, so that no token spans the place where the loss begins.
            return prompt, completion
        case Document(text):
            return (text,)
        case _:
            return ()

"""What a row means, once its format is known: one of four frozen kinds of example."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the model's chat template; loss on what the assistant says."""

    messages: tuple[Mapping[str, object], ...]

    def prompt(self) -> object:
        """What comes before the assistant speaks for the first time."""
        before = []
        for message in self.messages:
            if message.get("role") == ASSISTANT:
                break
            before.append(message)
        return before


@dataclass(frozen=True, slots=True)
class RawPair:
    """A prompt and its completion, taken as they are, without a template."""

    prompt_text: str
    completion: str

    def prompt(self) -> object:
        """The prompt."""
        return self.prompt_text


@dataclass(frozen=True, slots=True)
class Document:
    """Running text; loss on all of it."""

    text: str

    def prompt(self) -> object:
        """The text itself, so that copies of it stay together."""
        return self.text


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Tokens made elsewhere, and whether each carries loss."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def prompt(self) -> object:
        """The tokens before the first trained one, or all when there is none before."""
        first = self.trained.index(True) if any(self.trained) else 0
        return self.ids[:first] or self.ids


Example = Conversation | RawPair | Document | TokenRow


def canonical(example: Example) -> bytes:
    """The same bytes for the same content, whatever file kind or field names it came from.

    Raises:
        UnicodeEncodeError: A text holds half of a surrogate pair, which is no character.
    """
    match example:
        case Conversation(messages):
            content: object = ["conversation", messages]
        case RawPair(prompt, completion):
            content = ["pair", prompt, completion]
        case Document(text):
            content = ["text", text]
        case TokenRow(ids, trained):
            content = ["tokens", ids, trained]
    return _dump(content)


def prompt_digest(example: Example) -> int:
    """64 bits that stand for the prompt: examples that share it get the same ones."""
    return digest64(_dump(example.prompt()))


def digest64(content: bytes) -> int:
    """The first 64 bits of a cryptographic hash, as a number."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _dump(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()

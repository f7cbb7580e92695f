"""Text to token ids and back.

Two rules differ from the `tokenizers` library on which this stands. Text never becomes a
special token unless the caller allows it: whoever types `</s>` gets the characters. And the
beginning-of-text token is added here, by one rule, never twice.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from halfbyte.errors import FormatError, HalfbyteError, UsageError
from halfbyte.text.chat import ChatTokens, encode_chat, encode_chats, visible_messages
from halfbyte.text.decode_stream import DecodeStream
from halfbyte.text.special_tokens import SpecialTokens
from halfbyte.text.template import ChatTemplate, Message
from halfbyte.text.tokenizer_files import TokenizerFiles, read_tokenizer_files

_NUM_BYTES = 256


class Tokenizer:
    """The tokenizer of one model, with its chat template.

    Attributes:
        bos_id: Beginning of text, or None.
        eos_ids: Ids that end a text or a turn; the first one ends documents in training.
        adds_bos: Whether `encode` starts text with `bos_id`, as the model was trained.
        vocab_size: Number of ids, special tokens included.
        special: The special tokens.
    """

    def __init__(self, files: TokenizerFiles, origin: str) -> None:
        self.origin = origin
        self._files = files
        self._backend, prefix = _backend(files.tokenizer, origin)
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.special = SpecialTokens(_special_ids(self._backend, files))
        bos = files.roles.get("bos_token")
        self.bos_id: int | None = None if bos is None else self._id("bos_token", bos)
        eos = files.roles.get("eos_token")
        own = [] if eos is None else [self._id("eos_token", eos)]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(own + list(files.eos_ids)))
        if beyond := [i for i in self.eos_ids if i >= self.vocab_size]:
            raise FormatError(
                f"{origin}: eos_token_id: ids below {self.vocab_size} expected, found {beyond}"
            )
        habit = bool(prefix) and prefix[0] == self.bos_id
        self.adds_bos: bool = habit if files.adds_bos is None else files.adds_bos
        if self.adds_bos and self.bos_id is None:
            raise FormatError(f"{origin}: add_bos_token is true, but no file names a bos_token")
        self._is_byte = frozenset(
            i
            for i in (self._backend.token_to_id(f"<0x{b:02X}>") for b in range(_NUM_BYTES))
            if i is not None
        )
        self._special_ids = frozenset(self.special.ids.values())

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Open the tokenizer of a model directory.

        Raises:
            MissingFileError: There is no `tokenizer.json`.
            FormatError: Files are damaged or contradict each other.
        """
        return cls(read_tokenizer_files(Path(directory)), str(directory))

    def encode(
        self, text: str, *, allow_special: bool = False, bos: bool | None = None
    ) -> list[int]:
        """The ids of a text.

        Args:
            text: Any text.
            allow_special: Let names of special tokens in `text` become these tokens.
            bos: Start with `bos_id`; by default if the model was trained so (`adds_bos`). It
                is not added to ids that start with it.

        Raises:
            UsageError: `bos` is demanded of a model without that token, or `text` holds half
                a surrogate pair, which no encoding has.
        """
        ids = self.encoding(text, allow_special=allow_special).ids
        if self.adds_bos if bos is None else bos:
            if self.bos_id is None:
                raise UsageError(f"{self.origin}: the model has no beginning-of-text token")
            if ids[:1] != [self.bos_id]:
                ids.insert(0, self.bos_id)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts as by `encode(text, bos=False)`, on all processors.

        Raises:
            UsageError: A text holds half a surrogate pair.
        """
        for text in texts:
            _require_encodable(text)
        plain = [text for text in texts if not self.special.pattern.search(text)]
        encoded = iter(self._backend.encode_batch_fast(plain, add_special_tokens=False))
        return [
            self.encode(text, bos=False) if self.special.pattern.search(text) else next(encoded).ids
            for text in texts
        ]

    def encoding(self, text: str, *, allow_special: bool) -> Encoding:
        """Ids and character offsets, without a bos token."""
        _require_encodable(text)
        if allow_special or not self.special.pattern.search(text):
            return self._backend.encode(text, add_special_tokens=False)
        return self._renamed.encode(text, add_special_tokens=False)

    def encoding_of_secrets(self, text: str) -> Encoding:
        """Of a text in which special tokens bear their secret names (`special.as_secret`)."""
        _require_encodable(text)
        return self._renamed.encode(text, add_special_tokens=False)

    @cached_property
    def _renamed(self) -> Backend:
        return self.special.rename(self._backend)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids. Bytes that are no character become U+FFFD."""
        kept = [i for i in ids if not (skip_special and i in self._special_ids)]
        return self._backend.decode(kept, skip_special_tokens=False)

    def decode_stream(self, *, skip_special: bool = True) -> DecodeStream:
        """An object that takes ids one by one and gives text as soon as it is final."""
        return DecodeStream(
            lambda ids: self.decode(ids, skip_special=False),
            self._is_byte.__contains__,
            self._special_ids if skip_special else frozenset(),
        )

    def token(self, token_id: int) -> str:
        """How the vocabulary spells an id.

        Raises:
            UsageError: There is no such id.
        """
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            raise UsageError(
                f"{self.origin}: ids below {self.vocab_size} expected, found {token_id}"
            )
        return token

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can be talked to in turns."""
        return "default" in self._files.templates

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template.

        Raises:
            UsageError: It has none.
        """
        templates = self._files.templates
        if "default" not in templates:
            found = f", only templates for {', '.join(sorted(templates))}" if templates else ""
            raise UsageError(
                f"{self.origin} has no chat template{found}: it is a base model, or its directory "
                "is incomplete",
                hint="Use plain text (`halfbyte generate`, data with a `text` column), or put the "
                "template the model was trained with into chat_template.jinja in its directory.",
            )
        return ChatTemplate(templates["default"], self._files.roles, self.origin)

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """A conversation as the model reads it.

        Raises:
            UsageError: There is no chat template, or it does not accept these messages.
            UnsafeArtifactError: The template exceeds its limits.
        """
        plain = visible_messages(messages, self.special)
        text = self.chat_template.render(plain, add_generation_prompt=add_generation_prompt)
        return self.special.show(text)

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> ChatTokens:
        """The ids of a conversation; see `text.chat`."""
        return encode_chat(self, messages, add_generation_prompt=add_generation_prompt)

    def encode_chats(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[ChatTokens | HalfbyteError]:
        """The ids of many conversations, or what is wrong with one; several times as fast."""
        return encode_chats(self, conversations)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer, its policies and the chat template, in hexadecimal."""
        canonical = {
            "tokenizer": json.loads(self._files.tokenizer),
            "roles": dict(self._files.roles),
            "special": sorted(self.special.ids),
            "adds_bos": self.adds_bos,
            "eos_ids": self.eos_ids,
            "templates": dict(self._files.templates),
        }
        text = json.dumps(canonical, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _id(self, role: str, name: str) -> int:
        token_id = self._backend.token_to_id(name)
        if token_id is None:
            raise FormatError(f"{self.origin}: {role} {name!r} is not in the vocabulary")
        return token_id


def _backend(text: str, origin: str) -> tuple[Backend, list[int]]:
    """The library's tokenizer without its post-processor, and the ids that one puts first."""
    try:
        backend = Backend.from_str(text)
        prefix = backend.encode("").ids
    except Exception as error:  # the library raises nothing more specific
        raise FormatError(f"{origin}: tokenizer.json is not a tokenizer: {error!s:.300}") from error
    backend.post_processor = None  # also the part that trims offsets
    backend.no_padding()
    backend.no_truncation()
    return backend, prefix


def _special_ids(backend: Backend, files: TokenizerFiles) -> Mapping[str, int]:
    """Those that tokenizer.json calls special, and those that the configs give a role."""
    named = [*files.roles.values(), *files.special]
    backend.add_special_tokens([name for name in named if backend.token_to_id(name) is not None])
    return {
        token.content: token_id
        for token_id, token in backend.get_added_tokens_decoder().items()
        if token.content and (token.special or token.content in named)
    }


def _require_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"text: half a surrogate pair, U+{ord(text[error.start]):04X}, at character "
            f"{error.start}: such text has no UTF-8 encoding"
        ) from None

"""A tokenizer whose tokens can be counted by eye: one a byte of UTF-8."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halfbyte.data.formats import Format
from halfbyte.data.options import DataOptions, Overlong
from halfbyte.errors import HalfbyteError, UsageError

BOS, EOS, USER, ASSISTANT, SYSTEM = 256, 257, 258, 259, 260
ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}


@dataclass(frozen=True)
class Chat:
    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class ByteTokenizer:
    """Chats are `role-token text EOS` a message; the answer and its EOS are trained."""

    adds_bos: bool = False
    bos_id: int | None = BOS
    eos_ids: tuple[int, ...] = (EOS,)
    vocab_size: int = 261
    has_chat_template: bool = True

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        names = {BOS: "<s>", EOS: "</s>", USER: "<user>", ASSISTANT: "<assistant>", SYSTEM: "<sys>"}
        out = b"".join(
            bytes([i]) if i < 256 else b"" if skip_special else names[i].encode() for i in ids
        )
        return out.decode(errors="replace")

    def encode_chats(
        self, conversations: Sequence[Sequence[Mapping[str, object]]]
    ) -> list[Chat | HalfbyteError]:
        return [self._chat(messages) for messages in conversations]

    def _chat(self, messages: Sequence[Mapping[str, object]]) -> Chat | HalfbyteError:
        ids: list[int] = [BOS] if self.adds_bos else []
        trained = [False] * len(ids)
        for message in messages:
            if message["role"] not in ROLES:
                return UsageError(f"role {message['role']!r} is not known to the template")
            text = list(str(message["content"]).encode())
            ids += [ROLES[str(message["role"])], *text, EOS]
            trained += [False] + [message["role"] == "assistant"] * (len(text) + 1)
        return Chat(ids, trained)


def options(
    *,
    format: Format | None = None,  # noqa: A002
    max_length: int = 2048,
    overlong: Overlong = Overlong.REFUSE,
    train_on_prompt: bool = False,
) -> DataOptions:
    return DataOptions(format, max_length, overlong, train_on_prompt)

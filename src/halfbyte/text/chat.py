"""Conversations to ids, one way for training and for use, with the part that is learned.

Two things have to be known about a rendered conversation: which special tokens the template
wrote (those that stand in a message's text were typed by somebody), and where each answer
begins and ends. A template is a program, so neither can be read off it; both are found by
rendering again with small changes, and checked:

  - names of special tokens inside messages are hidden from the template by stand-ins;
  - a marker at each end of every message's text, which must not change anything else;
  - the conversation up to an answer, with and without the opening of the answer.

`text.answer_spans` decides from these where answers are.
"""

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from halfbyte.errors import HalfbyteError, UnsafeArtifactError, UsageError
from halfbyte.text.answer_spans import Turn, learned, opening_end
from halfbyte.text.special_tokens import SpecialTokens, secret_name
from halfbyte.text.template import Message, Rendering

if TYPE_CHECKING:
    from halfbyte.text.tokenizer import Tokenizer

MAX_DEPTH = 32
MAX_TOGETHER = 1 << 20
"""Characters of the messages that are sent for rendering at once."""
_BEGIN, _END = secret_name(), secret_name()
_MARKERS = re.compile(f"{_BEGIN}|{_END}")


@dataclass(frozen=True, slots=True)
class ChatTokens:
    """A conversation in ids.

    Attributes:
        ids: Token ids, special tokens included.
        trained: For every id whether the model is to learn it: answers with their
            end-of-turn token, nothing else.
    """

    ids: list[int]
    trained: list[bool]


_Encoding = Generator[list[Rendering], list[str | HalfbyteError], ChatTokens]


def encode_chat(
    tokenizer: "Tokenizer", messages: Sequence[Message], *, add_generation_prompt: bool
) -> ChatTokens:
    """The ids of a conversation and which of them are learned.

    Args:
        tokenizer: The model's tokenizer.
        messages: `role` and `content`, and whatever else the template reads.
        add_generation_prompt: End with the opening of an answer. Nothing is learned then.

    Raises:
        UsageError: There is no chat template, or it does not accept these messages.
        FormatError: The template does not let answers be told from the rest.
        UnsafeArtifactError: The template exceeds its limits, or a message and the template
            together spell a special token.
    """
    encoding = _encoding(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    texts = tokenizer.chat_template.try_render(next(encoding))
    return _finish(encoding, texts)


def encode_chats(
    tokenizer: "Tokenizer", conversations: Sequence[Sequence[Message]]
) -> list[ChatTokens | HalfbyteError]:
    """The same for many conversations, rendered together; a faulty one gives its error.

    Raises:
        UsageError: There is no chat template.
        UnsafeArtifactError: The template exceeds its limits.
    """
    results: dict[int, ChatTokens | HalfbyteError] = {}
    pending: list[tuple[int, _Encoding, list[Rendering]]] = []
    size = 0
    for place, messages in enumerate(conversations):
        encoding = _encoding(tokenizer, messages, add_generation_prompt=False)
        try:
            renderings = next(encoding)
        except HalfbyteError as error:
            results[place] = error
            continue
        own = sum(len(str(m)) for rendering in renderings for m in rendering.messages)
        if size + own > MAX_TOGETHER:
            results |= _finish_all(tokenizer, pending)
            pending, size = [], 0
        pending.append((place, encoding, renderings))
        size += own
    results |= _finish_all(tokenizer, pending)
    return [results[place] for place in range(len(conversations))]


def _finish_all(
    tokenizer: "Tokenizer", pending: Sequence[tuple[int, _Encoding, list[Rendering]]]
) -> dict[int, ChatTokens | HalfbyteError]:
    together = [one for _, _, renderings in pending for one in renderings]
    texts = iter(tokenizer.chat_template.try_render(together) if together else ())
    results: dict[int, ChatTokens | HalfbyteError] = {}
    for place, encoding, renderings in pending:
        own = [next(texts) for _ in renderings]
        try:
            results[place] = _finish(encoding, own)
        except HalfbyteError as error:
            results[place] = error
    return results


def _finish(encoding: _Encoding, texts: list[str | HalfbyteError]) -> ChatTokens:
    try:
        encoding.send(texts)
    except StopIteration as done:
        tokens: ChatTokens = done.value
        return tokens
    raise AssertionError("an encoding asks for renderings once")


def _encoding(
    tokenizer: "Tokenizer", messages: Sequence[Message], *, add_generation_prompt: bool
) -> _Encoding:
    """Asks for renderings, is sent their texts, and returns the ids."""
    special = tokenizer.special
    plain = visible_messages(messages, special)
    marked = [_marked(message) for message in plain]
    answers = [] if add_generation_prompt else _answers(plain)
    renderings = [
        Rendering(plain, add_generation_prompt),
        Rendering(marked, add_generation_prompt),
        *(Rendering(plain[:i], flag) for i in answers for flag in (False, True)),
    ]
    text, with_markers, *before = yield renderings
    if isinstance(text, HalfbyteError):
        raise text
    if isinstance(with_markers, HalfbyteError):
        with_markers = ""  # a template that reads the text closely: no marker is found
    origin = tokenizer.chat_template.origin
    faithful = _MARKERS.sub("", with_markers) == text
    if faithful and special.spelled_in(with_markers) != special.spelled_in(text):
        raise UnsafeArtifactError(
            f"chat template of {origin}: the text of a message and the template around it "
            "together spell a special token",
            hint="Remove the part of a special token at the start or end of the message.",
        )
    # From here on, special tokens bear names that no message can hold.
    exact = special.show(text) == text
    spelled = text if exact else special.as_secret(text)
    if exact:
        encoding = tokenizer.encoding(text, allow_special=True)
    else:
        encoding = tokenizer.encoding_of_secrets(spelled)
    if not answers:
        return ChatTokens(encoding.ids, [False] * len(encoding.ids))
    spell = (lambda one: one) if exact else special.as_secret
    openings = [
        opening_end(spelled, *(None if isinstance(r, HalfbyteError) else spell(r) for r in pair))
        for pair in zip(before[::2], before[1::2], strict=True)
    ]
    spans = _texts(spell(with_markers), len(plain), marked) if faithful else [None] * len(plain)
    turns = [Turn(span, None) for span in spans]
    for i, opening in zip(answers, openings, strict=True):
        turns[i] = Turn(spans[i], opening)
    return ChatTokens(encoding.ids, learned(tokenizer, spelled, encoding, turns, answers))


def visible_messages(
    messages: Sequence[Message], special: SpecialTokens
) -> list[dict[str, object]]:
    """The messages as the template sees them: plain data, names of special tokens hidden.

    Raises:
        UsageError: They are not messages; all problems are listed.
    """
    problems: list[str] = []
    visible: list[dict[str, object]] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or not isinstance(role, str):
            problems.append(f"{where}: an object with a `role` expected, found {message!r:.80}")
        elif special.spelled_in(role):
            problems.append(f"{where}: role: a plain word expected, found {role!r:.80}")
        else:
            plain = _plain(message, special, where, problems, MAX_DEPTH)
            assert isinstance(plain, dict)  # noqa: S101  (a mapping becomes a dict)
            visible.append(plain)
    if problems:
        raise UsageError("unusable messages", problems=problems)
    return visible


def _plain(
    value: object, special: SpecialTokens, where: str, problems: list[str], depth: int
) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return special.hide(str(value))
    if not depth:
        problems.append(f"{where}: nested deeper than {MAX_DEPTH} levels")
    elif isinstance(value, Mapping):
        copy = {}
        for key, item in value.items():
            if not isinstance(key, str) or special.spelled_in(key):
                problems.append(f"{where}: a plain name expected as a key, found {key!r:.80}")
            else:
                copy[key] = _plain(item, special, f"{where}.{key}", problems, depth - 1)
        return copy
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [
            _plain(item, special, f"{where}[{i}]", problems, depth - 1)
            for i, item in enumerate(value)
        ]
    else:
        problems.append(f"{where}: text, numbers, lists and objects expected, found {value!r:.80}")
    return None


def _answers(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _marked(message: Mapping[str, object]) -> dict[str, object]:
    """The message with markers around its text, inside any white space a template may trim."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _around(content, first=True, last=True)}
    if isinstance(content, list):
        texts = [i for i, part in enumerate(content) if _has_text(part)]
        parts = list(content)
        for i in texts:
            text = _around(content[i]["text"], first=i == texts[0], last=i == texts[-1])
            parts[i] = {**content[i], "text": text}
        return {**message, "content": parts}
    return dict(message)


def _has_text(part: object) -> TypeGuard[dict[str, str]]:
    text = part.get("text") if isinstance(part, dict) else None
    return isinstance(text, str) and bool(text.strip())


def _around(text: str, *, first: bool, last: bool) -> str:
    core = text.strip()
    if not core:  # templates ask whether there is text at all
        return text
    begin = text.index(core)
    marked = (_BEGIN if first else "") + core + (_END if last else "")
    return text[:begin] + marked + text[begin + len(core) :]


def _texts(
    with_markers: str, count: int, marked: Sequence[Message]
) -> list[tuple[int, int] | None]:
    """Where each message's text stands, if every marker is there once and in order."""
    expected = [i for i, message in enumerate(marked) if _has_marker(message)]
    kinds, places, removed = [], [], 0
    for match in _MARKERS.finditer(with_markers):
        kinds.append(match[0])
        places.append(match.start() - removed)
        removed += len(match[0])
    spans: list[tuple[int, int] | None] = [None] * count
    # A template may leave texts out (a system message, earlier reasoning): then the markers
    # cannot be told apart, and none is used.
    if kinds == [_BEGIN, _END] * len(expected):
        for i, message in enumerate(expected):
            spans[message] = (places[2 * i], places[2 * i + 1])
    return spans


def _has_marker(message: Message) -> bool:
    content = message.get("content")
    texts = content if isinstance(content, list) else [{"text": content}]
    return any(_BEGIN in part["text"] for part in texts if _has_text(part))

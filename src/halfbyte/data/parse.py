"""From a row's fields to an example, or the first thing that is wrong with it.

Anything that would change the meaning of a row if it were left out (tools, weights, padding)
is refused rather than ignored.
"""

from collections.abc import Mapping, Sequence

from halfbyte.data.examples import ASSISTANT, Conversation, Document, Example, RawPair, TokenRow
from halfbyte.data.formats import Format, FormatChoice
from halfbyte.data.json_text import describe
from halfbyte.data.problems import RowError

NO_TARGET = -100
"""The label of a token without loss, as everywhere in the field."""

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    "system": "system",
}


def parse_row(fields: Mapping[str, object], choice: FormatChoice) -> Example:
    """The example that a row stands for.

    Raises:
        RowError: Values are missing, of wrong types, empty, or not supported.
    """
    match choice.format:
        case Format.MESSAGES:
            return _conversation(fields, _messages(fields["messages"], "messages"))
        case Format.SHAREGPT:
            turns = _messages(fields["conversations"], "conversations")
            return _conversation(fields, [*_system(fields), *turns])
        case Format.ALPACA:
            return _alpaca(fields, choice.fields)
        case Format.PROMPT_COMPLETION:
            prompt, completion = (_text(fields, name) for name in choice.fields)
            return RawPair(prompt, _filled(completion, choice.fields[1]))
        case Format.TEXT:
            return Document(_filled(_text(fields, "text"), "text"))
        case Format.TOKENS:
            return _tokens(fields)


def _conversation(
    fields: Mapping[str, object], messages: Sequence[Mapping[str, object]]
) -> Conversation:
    if fields.get("tools"):
        raise RowError("`tools` are not supported")
    if not messages:
        raise RowError("no messages")
    if not any(message["role"] == ASSISTANT for message in messages):
        raise RowError("no message of the assistant, so nothing to train on")
    return Conversation(tuple(messages))


def _messages(turns: object, name: str) -> list[Mapping[str, object]]:
    if not isinstance(turns, list):
        raise RowError(f"`{name}`: a list expected, found {describe(turns)}")
    parse = _sharegpt_turn if name == "conversations" else _message
    return [parse(turn, f"`{name}[{index}]`") for index, turn in enumerate(turns)]


def _message(turn: object, where: str) -> Mapping[str, object]:
    if not isinstance(turn, dict):
        raise RowError(f"{where}: an object expected, found {describe(turn)}")
    role = turn.get("role")
    if not isinstance(role, str) or not role:
        raise RowError(f"{where}: `role` as text expected, found {describe(role)}")
    if turn.get("weight", 1) != 1:
        raise RowError(f"{where}: `weight` other than 1 is not supported")
    # Arrow fills absent fields with null; a template asks whether a field is defined.
    kept = {key: value for key, value in turn.items() if value is not None and key != "weight"}
    content = _content(kept.get("content"), where)
    if role == ASSISTANT and not content.strip() and not kept.get("tool_calls"):
        raise RowError(f"{where}: the assistant's message is empty")
    return {**kept, "content": content}


def _content(content: object, where: str) -> str:
    """Text, or the joined texts of OpenAI's list of parts."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise RowError(f"{where}: `content` as text expected, found {describe(content)}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise RowError(f"{where}: only text parts are supported in `content`")
        texts.append(text)
    return "".join(texts)


def _sharegpt_turn(turn: object, where: str) -> Mapping[str, object]:
    if isinstance(turn, dict) and "from" not in turn and "role" in turn:
        return _message(turn, where)
    if not isinstance(turn, dict):
        raise RowError(f"{where}: an object expected, found {describe(turn)}")
    speaker = turn.get("from")
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(SHAREGPT_ROLES)
        raise RowError(f"{where}: `from` must be one of {known}; found {speaker!r}")
    return _message({"role": role, "content": _text(turn, "value", where)}, where)


def _system(fields: Mapping[str, object]) -> list[Mapping[str, object]]:
    if not fields.get("system"):
        return []
    return [{"role": "system", "content": _text(fields, "system")}]


def _alpaca(fields: Mapping[str, object], names: tuple[str, ...]) -> Conversation:
    if fields.get("history"):
        raise RowError("`history` is not supported: write the turns as `messages`")
    question, answer = (_text(fields, name) for name in names)
    _filled(question, names[0])
    if "input" not in names and fields.get("input"):
        question = f"{question}\n\n{_text(fields, 'input')}"
    return Conversation(
        (
            *_system(fields),
            {"role": "user", "content": question},
            {"role": ASSISTANT, "content": _filled(answer, names[1])},
        )
    )


def _text(fields: Mapping[str, object], name: str, where: str = "") -> str:
    value = fields.get(name)
    if isinstance(value, str):
        return value
    where = f"{where}: " if where else ""
    if isinstance(value, list) and name in {"prompt", "completion"}:
        raise RowError(f"`{name}` is a list: write the whole conversation as `messages`")
    raise RowError(f"{where}`{name}` as text expected, found {describe(value)}")


def _filled(text: str, name: str) -> str:
    if not text.strip():
        raise RowError(f"`{name}` is empty")
    return text


def _tokens(fields: Mapping[str, object]) -> TokenRow:
    ids = _whole_numbers(fields["input_ids"], "input_ids")
    if not ids:
        raise RowError("`input_ids` is empty")
    if negative := [token for token in ids if token < 0]:
        raise RowError(f"`input_ids` holds {negative[0]}")
    attended = fields.get("attention_mask")
    if attended is not None and _whole_numbers(attended, "attention_mask") != [1] * len(ids):
        raise RowError("`attention_mask` hides tokens: remove the padding")
    if fields.get("labels") is None:
        return TokenRow(tuple(ids), (True,) * len(ids))
    labels = _whole_numbers(fields["labels"], "labels")
    if len(labels) != len(ids):
        raise RowError(f"{len(ids)} `labels` expected as in `input_ids`, found {len(labels)}")
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in {token, NO_TARGET}:
            raise RowError(
                f"`labels[{place}]`: {token} as in `input_ids`, or {NO_TARGET} expected, found "
                f"{label} (labels stand under their own token, not shifted)"
            )
    return TokenRow(tuple(ids), tuple(label != NO_TARGET for label in labels))


def _whole_numbers(values: object, name: str) -> list[int]:
    if not isinstance(values, list):
        raise RowError(f"`{name}`: a list of whole numbers expected, found {describe(values)}")
    for value in values:
        if type(value) is not int:
            raise RowError(f"`{name}`: whole numbers expected, found {describe(value)}")
    return values

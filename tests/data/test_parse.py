"""From fields to examples, and what is wrong with those that are none."""

from collections.abc import Mapping

import pytest

from halfbyte.data.examples import Conversation, Document, Example, RawPair, TokenRow
from halfbyte.data.formats import Format, FormatDetector
from halfbyte.data.parse import parse_row
from halfbyte.data.problems import Problems, RowError
from halfbyte.data.rows import Origin, Row


def parse(fields: Mapping[str, object], asked: Format | None = None) -> Example:
    detector = FormatDetector(asked, Problems())
    ((row, choice),) = detector.settle([Row(Origin("a.jsonl", 1), fields)])
    return parse_row(row.fields, choice)


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = Conversation((say("system", "s"), say("user", "q"), say("assistant", "a")))

GOOD = [
    ({"messages": [say("system", "s"), say("user", "q"), say("assistant", "a")]}, CHAT),
    (
        {
            "messages": [
                say("system", "s"),
                say("user", "q"),
                {**say("assistant", "a"), "weight": 1},
            ],
            "tools": [],
        },
        CHAT,
    ),
    (
        {
            "messages": [
                say("system", "s"),
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {**say("assistant", "a"), "name": None},
            ]
        },
        CHAT,
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        CHAT,
    ),
    (
        {"conversations": [{"from": "human", "value": "q"}, say("assistant", "a")], "system": "s"},
        CHAT,
    ),
    ({"instruction": "q", "input": "", "output": "a", "system": "s", "history": []}, CHAT),
    (
        {"instruction": "q", "input": "ctx", "output": "a"},
        Conversation((say("user", "q\n\nctx"), say("assistant", "a"))),
    ),
    ({"prompt": "p ", "completion": "c"}, RawPair("p ", "c")),
    ({"prompt": "", "completion": "c"}, RawPair("", "c")),
    ({"input": "p", "output": "c"}, RawPair("p", "c")),
    ({"text": "t\n"}, Document("t\n")),
    ({"input_ids": [5, 6, 7]}, TokenRow((5, 6, 7), (True, True, True))),
    (
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
        TokenRow((5, 6, 7), (False, True, True)),
    ),
]


@pytest.mark.parametrize(("fields", "expected"), GOOD)
def test_rows_become_examples(fields: Mapping[str, object], expected: Example) -> None:
    assert parse(fields) == expected


def test_the_answer_to_a_question_named_input_is_not_its_context_too() -> None:
    found = parse({"input": "q", "output": "a"}, Format.ALPACA)
    assert found == Conversation((say("user", "q"), say("assistant", "a")))


BAD = [
    ({"messages": "x"}, "`messages`: a list expected, found text"),
    ({"messages": []}, "no messages"),
    ({"messages": ["x"]}, "`messages[0]`: an object expected, found text"),
    ({"messages": [{"content": "x"}]}, "`messages[0]`: `role` as text expected, found null"),
    (
        {"messages": [{"role": "user", "content": 5}]},
        "`messages[0]`: `content` as text expected, found a whole number",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "`messages[0]`: only text parts are supported in `content`",
    ),
    ({"messages": [say("user", "q")]}, "no message of the assistant, so nothing to train on"),
    (
        {"messages": [say("user", "q"), say("assistant", " ")]},
        "`messages[1]`: the assistant's message is empty",
    ),
    (
        {"messages": [{**say("assistant", "a"), "weight": 0}]},
        "`messages[0]`: `weight` other than 1 is not supported",
    ),
    ({"messages": [say("assistant", "a")], "tools": [{}]}, "`tools` are not supported"),
    ({"conversations": [5]}, "`conversations[0]`: an object expected, found a whole number"),
    (
        {"conversations": [{"from": "observation", "value": "x"}]},
        "`conversations[0]`: `from` must be one of human, user, gpt, assistant, chatgpt, model, system; found 'observation'",
    ),
    (
        {"conversations": [{"from": "human", "value": None}]},
        "`conversations[0]`: `value` as text expected, found null",
    ),
    (
        {"instruction": "q", "output": "a", "history": [["x", "y"]]},
        "`history` is not supported: write the turns as `messages`",
    ),
    ({"instruction": "", "output": "a"}, "`instruction` is empty"),
    ({"instruction": "q", "output": ""}, "`output` is empty"),
    (
        {"instruction": "q", "output": "a", "input": 5},
        "`input` as text expected, found a whole number",
    ),
    ({"prompt": "p", "completion": "\n"}, "`completion` is empty"),
    ({"prompt": None, "completion": "c"}, "`prompt` as text expected, found null"),
    (
        {"prompt": [say("user", "q")], "completion": []},
        "`prompt` is a list: write the whole conversation as `messages`",
    ),
    ({"text": ""}, "`text` is empty"),
    ({"text": 1.5}, "`text` as text expected, found a fraction"),
    ({"input_ids": []}, "`input_ids` is empty"),
    ({"input_ids": [1, -1]}, "`input_ids` holds -1"),
    ({"input_ids": [True]}, "`input_ids`: whole numbers expected, found true or false"),
    ({"input_ids": "1 2"}, "`input_ids`: a list of whole numbers expected, found text"),
    ({"input_ids": [1, 2], "labels": [1]}, "2 `labels` expected as in `input_ids`, found 1"),
    (
        {"input_ids": [1, 2], "labels": [2, -100]},
        "`labels[0]`: 1 as in `input_ids`, or -100 expected, found 2 (labels stand under their own token, not shifted)",
    ),
    (
        {"input_ids": [1, 2], "attention_mask": [1, 0]},
        "`attention_mask` hides tokens: remove the padding",
    ),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_faulty_rows_say_what_is_wrong(fields: Mapping[str, object], message: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(fields)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (RawPair("p", "1"), RawPair("p", "2"), True),
        (RawPair("p", "1"), RawPair("q", "1"), False),
        (
            CHAT,
            Conversation((*CHAT.messages[:2], say("assistant", "other"), say("user", "more"))),
            True,
        ),
        (CHAT, Conversation(CHAT.messages[1:]), False),
        (
            TokenRow((1, 2, 3), (False, False, True)),
            TokenRow((1, 2, 4), (False, False, True)),
            True,
        ),
        (TokenRow((1, 2), (True, True)), TokenRow((1, 3), (True, True)), False),
        (Document("a"), Document("a"), True),
    ],
)
def test_prompts(left: Example, right: Example, same: bool) -> None:
    assert (left.prompt() == right.prompt()) is same

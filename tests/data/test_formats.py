"""Which format a data set is in: found, asked for, ambiguous, mixed."""

from collections.abc import Sequence

import pytest

from halfbyte.data.formats import Format, FormatDetector
from halfbyte.data.problems import Problems
from halfbyte.data.rows import Origin, Row


def settle(
    rows: Sequence[str], asked: Format | None = None
) -> tuple[FormatDetector, list[int], list[str]]:
    """Rows are given as names of their fields."""
    problems = Problems()
    detector = FormatDetector(asked, problems)
    found = [
        Row(Origin("a.jsonl", number), dict.fromkeys(names.split(), ""))
        for number, names in enumerate(rows, start=1)
    ]
    kept = [row.origin.number for row, _ in detector.settle(found)]
    return detector, kept, problems.listed


@pytest.mark.parametrize(
    ("names", "format_", "fields"),
    [
        ("messages", Format.MESSAGES, ("messages",)),
        ("id conversations", Format.SHAREGPT, ("conversations",)),
        ("prompt completion", Format.PROMPT_COMPLETION, ("prompt", "completion")),
        ("question answer", Format.PROMPT_COMPLETION, ("question", "answer")),
        ("subject input output", Format.PROMPT_COMPLETION, ("input", "output")),
        ("instruction input output", Format.ALPACA, ("instruction", "output")),
        ("instruction response", Format.ALPACA, ("instruction", "response")),
        ("text", Format.TEXT, ("text",)),
        ("input_ids labels attention_mask", Format.TOKENS, ("input_ids",)),
    ],
)
def test_found_by_field_names(names: str, format_: Format, fields: tuple[str, ...]) -> None:
    detector, kept, problems = settle([names])
    assert problems == []
    assert kept == [1]
    assert detector.choice is not None
    assert (detector.choice.format, detector.choice.fields) == (format_, fields)
    assert detector.choice.reason == "the rows have " + ", ".join(f"`{name}`" for name in fields)


def test_ambiguous_rows_name_the_setting_once() -> None:
    _, kept, problems = settle(["instruction output text"] * 5)
    assert kept == []
    assert problems == ["a.jsonl:1: fits alpaca and text: set data.format to the one that is meant"]


def test_asked_for_formats_settle_what_is_ambiguous() -> None:
    detector, kept, problems = settle(["instruction output text"] * 2, Format.TEXT)
    assert (kept, problems) == ([1, 2], [])
    assert (
        str(detector.choice)
        == "text (running text, cut at the maximum length): data.format says so"
    )
    assert list(detector.ignored) == ["instruction", "output"]


def test_a_template_wraps_raw_pairs_when_asked() -> None:
    detector, kept, _ = settle(["question answer"], Format.ALPACA)
    assert kept == [1]
    assert detector.choice is not None
    assert detector.choice.fields == ("question", "answer")


def test_asked_for_a_format_that_the_rows_are_not_in() -> None:
    _, kept, problems = settle(["prompt completion"] * 3, Format.MESSAGES)
    assert kept == []
    assert problems == ["a.jsonl:1: messages expected for messages, found `prompt`, `completion`"]


def test_unknown_fields_list_what_is_known() -> None:
    _, _, problems = settle(["x y"])
    assert problems[0].startswith(
        "a.jsonl:1: no known format has the fields `x`, `y`; known: messages (messages); "
    )


def test_mixed_formats_and_missing_fields_are_named_row_by_row() -> None:
    _, kept, problems = settle(["prompt completion", "messages", "prompt", "prompt completion id"])
    assert kept == [1, 4]
    assert problems == [
        "a.jsonl:2: mixed formats: messages with `messages`, but the first row (a.jsonl:1) is prompt_completion with `prompt`, `completion`",
        "a.jsonl:3: `prompt`, `completion` expected as in a.jsonl:1, found `prompt`",
    ]


def test_fields_that_are_not_read_are_named() -> None:
    detector, _, _ = settle(["instruction input output id", "instruction output source"])
    assert list(detector.ignored) == ["id", "source"]

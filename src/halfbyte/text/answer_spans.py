"""Where the answers of a rendered conversation are: what a model learns of it.

An answer begins where the rendering of everything before it, the opening of the answer
included, ends; where the template has no such opening, at its own text. It ends with the
first end-of-text token after its text, or else with the special token that follows its text
directly. Where these disagree or something is missing, that is an error: learning a wrong
span would teach the wrong thing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from tokenizers import Encoding

from halfbyte.errors import FormatError

if TYPE_CHECKING:
    from halfbyte.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Turn:
    """What is known about one message, in characters of the rendered text.

    Attributes:
        text: Begin and end of its own text, without white space around it.
        opening: Where the rendering of all before it, with the opening of an answer, ends.
    """

    text: tuple[int, int] | None
    opening: int | None


@dataclass(frozen=True, slots=True)
class _Stop:
    """One special token in the text."""

    begin: int
    end: int
    is_eos: bool


def opening_end(text: str, before: str | None, with_prompt: str | None) -> int | None:
    """Where the opening of an answer ends, if the template has one and uses it here."""
    if with_prompt is None or before == with_prompt or not text.startswith(with_prompt):
        return None
    return len(with_prompt)


def learned(
    tokenizer: "Tokenizer",
    text: str,
    encoding: Encoding,
    turns: Sequence[Turn],
    answers: Sequence[int],
) -> list[bool]:
    """For every id of `encoding` whether it belongs to an answer.

    An id that shares a character with an answer belongs to it.

    Args:
        tokenizer: Gives the special ids and those that end a turn.
        text: The rendered conversation, which `encoding` encodes.
        encoding: Ids and their offsets in `text`.
        turns: One for each message.
        answers: Positions in `turns` of the messages to learn.

    Raises:
        FormatError: Answers cannot be told from the rest; all problems are listed.
    """
    special_ids = set(tokenizer.special.ids.values())
    stops = [
        _Stop(begin, end, token in tokenizer.eos_ids)
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
        if token in special_ids
    ]
    problems: list[str] = []
    regions: list[tuple[int, int]] = []
    for i in answers:
        turn = turns[i]
        start = turn.opening if turn.opening is not None else turn.text and turn.text[0]
        if start is None:
            problems.append(f"messages[{i}]: cannot find where the answer begins")
        elif turn.text and turn.text[0] < start:
            problems.append(f"messages[{i}]: its text begins before its opening ends")
        elif (end := _end(text, stops, turn, start, _bound(turns, i, len(text)))) is None:
            problems.append(
                f"messages[{i}]: no end-of-turn token follows the answer: a model that learns it "
                "would not learn to stop"
            )
        else:
            regions.append((start, end))
    problems += [
        "an answer begins inside the one before it"
        for earlier, later in pairwise(regions)
        if later[0] < earlier[1]
    ]
    if problems:
        raise FormatError(
            f"chat template of {tokenizer.chat_template.origin}: answers cannot be told from the "
            "rest of the conversation",
            problems=problems,
            hint="Train on rows with a prompt and a completion instead, or correct the template: "
            "every answer must end with a special token such as the model's eos_token.",
        )
    return _overlapping(encoding.offsets, regions)


def _bound(turns: Sequence[Turn], i: int, length: int) -> int:
    """Where the next thing begins that is not part of answer `i`."""
    for turn in turns[i + 1 :]:
        starts = [turn.opening] if turn.opening is not None else []
        starts += [turn.text[0]] if turn.text else []
        if starts:
            return min(starts)
    return length


def _end(text: str, stops: Sequence[_Stop], turn: Turn, start: int, bound: int) -> int | None:
    """Where the end-of-turn token ends."""
    text_end = turn.text[1] if turn.text else start
    following = [stop for stop in stops if text_end <= stop.begin < bound]
    for stop in following:
        if stop.is_eos:
            return stop.end
    if turn.text and following and not text[text_end : following[0].begin].strip():
        return following[0].end
    return None


def _overlapping(
    offsets: Sequence[tuple[int, int]], regions: Sequence[tuple[int, int]]
) -> list[bool]:
    trained = [False] * len(offsets)
    remaining = iter(regions)
    region = next(remaining, None)
    for i, (begin, end) in enumerate(offsets):
        while region is not None and begin >= region[1]:
            region = next(remaining, None)
        trained[i] = region is not None and end > region[0]
    return trained

"""Stop strings that arrive in pieces."""

import itertools

import pytest

from halfbyte.generation.stop_strings import StopStrings

TEXTS = ["hello<|end|>rest", "aaab", "aab", "ab<|en", "", "nothing here", "x<|e<|end|>", "ENDEN"]
STOPS = [["<|end|>"], ["aab"], ["END", "DE"], [""], []]


def expected(text: str, stops: list[str]) -> str:
    found = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(found)] if found else text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_any_cut_of_a_text_gives_what_comes_before_the_stop(text: str, stops: list[str]) -> None:
    for first, second in itertools.combinations(range(len(text) + 1), 2):
        filtered = StopStrings(stops)
        pieces = [text[:first], text[first:second], text[second:]]
        passed = "".join(filtered.push(piece) for piece in pieces)
        if not filtered.found:
            passed += filtered.finish()
        assert passed == expected(text, stops)
        assert filtered.found == any(stop and stop in text for stop in stops)


def test_text_that_cannot_begin_a_stop_passes_at_once() -> None:
    filtered = StopStrings(["STOP"])
    assert filtered.push("abS") == "ab"
    assert filtered.push("x") == "Sx"
    assert filtered.push("STOP more") == ""
    assert filtered.push("even more") == ""

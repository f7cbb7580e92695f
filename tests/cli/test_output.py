"""Text and JSON of the commands."""

import io
import sys

import pytest

from halfbyte.cli import progress
from halfbyte.cli.output import Output, format_bytes, format_table


def test_table_aligns_words_left_and_numbers_right() -> None:
    text = format_table(("name", "size"), [("a", "1.5"), ("long name", "-12.25"), ("b", "")])
    assert text == "name         size\na             1.5\nlong name  -12.25\nb"


def test_an_empty_table_is_its_heading() -> None:
    assert format_table(("name", "size"), []) == "name  size"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (3 << 40, "3.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=True).emit({"a": [1.5, float("inf")], "b": {"c": float("nan")}, "d": "é"})
    assert capsys.readouterr().out == '{"a": [1.5, null], "b": {"c": null}, "d": "é"}\n'


def test_without_json_emit_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Output().emit({"a": 1})
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    Output().heading("Kernels")
    assert terminal.getvalue() == "\033[1mKernels\033[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    Output().heading("Kernels")
    assert terminal.getvalue() == "Kernels\n"


def test_progress_off_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 11.0, 12.0, 22.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.show_progress("quantizing", 4) as advance:
        for _ in range(4):
            advance(1)
    assert capsys.readouterr().err == "quantizing: 50%, 11 s left\nquantizing: 100%, 0 s left\n"


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.show_progress("quantizing", 4) as advance:
        advance(4)
    assert "quantizing" in terminal.getvalue()
    assert "100%" in terminal.getvalue()


def test_progress_in_bytes_says_how_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.show_progress("quantizing", 4 << 20, in_bytes=True) as advance:
        advance(1 << 20)
    assert capsys.readouterr().err == "quantizing: 25%, 1.0 MiB of 4.0 MiB, 30 s left\n"

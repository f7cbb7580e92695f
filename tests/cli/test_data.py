"""`halfbyte data check` and `data show` on a small tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data.fake_tokenizer import ByteTokenizer
from halfbyte.cli import app
from halfbyte.text.tokenizer import Tokenizer

ROWS = [{"prompt": f"q{number % 4} ", "completion": "a" * (number + 1)} for number in range(12)]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setattr(Tokenizer, "load", lambda _: ByteTokenizer())

    def call(command: str, *arguments: object) -> tuple[int, str, str]:
        code = app.run(["data", command, "model", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_check_says_what_is_there(run: Run, data: Path) -> None:
    code, out, _ = run("check", data, "--eval-fraction", "0.25", "--tokens-per-step", "40")
    assert code == 0
    assert (
        "prompt_completion (raw prompt, completion, end token; no chat template): the rows have"
        in out
    )
    assert "rows         12" in out
    assert "longest: " in out
    assert "steps of at most 40 tokens" in out


def test_check_as_json(run: Run, data: Path) -> None:
    code, out, _ = run("check", data, "--eval-fraction", "0.25", "--tokens-per-step", "40", "--micro-batch-tokens", "20", "--json")  # fmt: skip
    record = json.loads(out)
    assert code == 0
    assert record["data"][0]["format"] == "prompt_completion"
    train, held_out = record["sizes"]["train"], record["sizes"]["eval"]
    assert train["num_documents"] + held_out["num_documents"] == 12
    assert held_out["num_documents"] == 3
    assert record["num_eval_prompts_trained_on"] == 0
    # A row is 3 bytes of prompt, its answer, and the end; targets are the answer and the end.
    assert train["num_targets"] + held_out["num_targets"] == sum(range(1, 13)) + 12
    assert train["num_tokens"] - train["num_targets"] == 3 * train["num_documents"]
    assert sum(bar["count"] for bar in train["histogram"]) == train["num_documents"]
    assert record["epoch"]["mean_tokens"] * record["epoch"]["num_steps"] == pytest.approx(
        train["num_tokens"]
    )


def test_micro_batches_are_those_of_training(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    settings = ("--eval-fraction", "0", "--tokens-per-step", "4096", "--max-length", "3000")
    # A row is 2 bytes of prompt, its answer, and the end.
    for length, expected in ((900, 2048), (2900, 2903)):
        row = json.dumps({"prompt": "q ", "completion": "a" * length}) + "\n"
        path.write_text(4 * row)
        assert f"micro-batches of at most {expected}\n" in run("check", path, *settings)[1]


def test_check_of_data_for_evaluation(run: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS[0]))
    _, out, _ = run("check", data, "--eval", tmp_path / "b.jsonl", "--json")
    record = json.loads(out)
    assert [size["num_documents"] for size in record["sizes"].values()] == [12, 1]
    assert len(record["data"]) == 2
    assert record["num_eval_prompts_trained_on"] == 1
    _, out, _ = run("check", data, "--eval", tmp_path / "b.jsonl")
    assert "1 of 1 documents for evaluation have a prompt that is also trained on" in out


def test_check_lists_problems_and_fails(run: Run, data: Path) -> None:
    with data.open("a") as file:
        file.write('{"prompt": 1, "completion": "x"}\n')
    code, out, _ = run("check", data, "--max-length", "14")
    assert code == 1
    assert "problem: a.jsonl:11: 15 tokens, more than data.max_length = 14" in out
    assert "problem: a.jsonl:13: `prompt` as text expected, found a whole number" in out


def test_check_of_nothing_usable(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    code, out, _ = run(
        "check", tmp_path / "a.jsonl", "--eval-fraction", "0.5", "--tokens-per-step", "9"
    )
    assert code == 1
    assert "no known format has the fields `x`" in out


def test_check_names_rows_beyond_the_budget(run: Run, data: Path) -> None:
    code, _, err = run("check", data, "--tokens-per-step", "10")
    assert code == 1
    assert "the longest is a.jsonl:12 with 16 tokens" in err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("check", ["--format", "chat"], "option for data.format: data.format: Input should be 'auto', 'messages'"),
        ("check", ["--overlong", "cut"], "option for data.overlong: data.overlong: Input should be 'refuse'"),
        ("check", ["--eval", "x", "--eval-fraction", "0.1"], "exclude each other"),
        ("show", ["--row", "1", "--at", "a.jsonl:1"], "exclude each other"),
        ("show", ["--row", "0"], "--row: at least 1 expected"),
        ("show", ["--row", "13"], "no row 13 to show, it has 12 rows"),
        ("show", ["--at", "b.jsonl:1"], "no row b.jsonl:1"),
        ("show", ["--row", "12", "--max-length", "9", "--overlong", "drop"], "row 12 is left out: a.jsonl:12 (16 tokens)"),
    ],
)  # fmt: skip
def test_usage_errors(
    run: Run, data: Path, command: str, arguments: list[str], message: str
) -> None:
    code, _, err = run(command, data, *arguments)
    assert code == 2
    assert message in err


def test_show_marks_the_trained_tokens(run: Run, data: Path) -> None:
    code, out, _ = run("show", data, "--row", "3")
    assert code == 0
    assert out == "a.jsonl:3: 7 tokens, 4 of them trained\nq2 ⟦aaa</s>⟧\n"
    assert run("show", data, "--at", "a.jsonl:3")[1] == out


def test_show_as_json(run: Run, data: Path) -> None:
    _, out, _ = run("show", data, "--row", "3", "--train-on-prompt", "--json")
    (document,) = json.loads(out)["documents"]
    assert document["at"] == "a.jsonl:3"
    # Nothing comes before the first token, so nothing predicts it.
    assert [(run["trained"], run["text"]) for run in document["runs"]] == [
        (False, "q"),
        (True, "2 aaa</s>"),
    ]


def test_show_in_colour(run: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = run("show", data, "--row", "3")
    assert "\x1b[2mq2 \x1b[0m\x1b[1;32maaa</s>\x1b[0m" in out


def test_show_of_a_faulty_row_says_only_what_is_wrong_with_it(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n{"text": 1}\n{"text": "b"}\n')
    code, _, err = run("show", path, "--row", "3")
    assert code == 1
    assert "a.jsonl:3: `text` as text expected" in err
    assert "a.jsonl:2" not in err
    assert run("show", path, "--row", "4")[0] == 0


def test_show_of_plain_text_shows_pieces(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdef")
    _, out, _ = run("show", tmp_path / "a.txt", "--row", "2", "--max-length", "4")
    assert out == "a.txt:token 4: 3 tokens, 3 of them trained\n⟦ef</s>⟧\n"

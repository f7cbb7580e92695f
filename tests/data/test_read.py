"""Whole data sets through a tokenizer: masks, lengths, cuts, problems, fingerprints."""

import csv
import gzip
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.fake_tokenizer import ASSISTANT, BOS, EOS, USER, ByteTokenizer, options
from halfbyte.data import text_files
from halfbyte.data.dataset import Dataset
from halfbyte.data.formats import Format
from halfbyte.data.options import Overlong
from halfbyte.data.read import load_dataset, read_dataset
from halfbyte.data.reading import Reading
from halfbyte.data.rows import Origin
from halfbyte.data.store import StoreBuilder
from halfbyte.errors import ConfigError, DataError, UnsafeArtifactError

TOKENIZER = ByteTokenizer()
WITH_BOS = ByteTokenizer(adds_bos=True)


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(
    tmp_path: Path, rows: Sequence[object], tokenizer: ByteTokenizer = TOKENIZER, **changes: object
) -> Reading:
    return read_dataset(write(tmp_path / "a.jsonl", rows), tokenizer, options(**changes))  # type: ignore[arg-type]


def documents(dataset: Dataset) -> list[tuple[list[int], list[int | None]]]:
    """Tokens, and for each the token it has to predict or None."""
    store = dataset.store
    found = []
    for start, end in zip(store.starts[dataset.index], store.ends[dataset.index], strict=True):
        targets = [
            int(store.tokens[i + 1]) if store.has_target[i] else None for i in range(start, end)
        ]
        found.append((store.tokens[start:end].tolist(), targets))
    return found


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"}]}
A, B, P, Q = b"abpq"


@pytest.mark.parametrize(
    ("row", "tokenizer", "train_on_prompt", "tokens", "targets"),
    [
        (pair("p", "ab"), TOKENIZER, False, [P, A, B, EOS], [A, B, EOS, None]),
        (pair("p", "ab"), WITH_BOS, False, [BOS, P, A, B, EOS], [None, A, B, EOS, None]),
        (pair("p", "ab"), WITH_BOS, True, [BOS, P, A, B, EOS], [P, A, B, EOS, None]),
        (pair("", "ab"), TOKENIZER, False, [A, B, EOS], [B, EOS, None]),
        (CHAT, TOKENIZER, False, [USER, Q, EOS, ASSISTANT, A, B, EOS], [None] * 3 + [A, B, EOS, None]),
        (CHAT, TOKENIZER, True, [USER, Q, EOS, ASSISTANT, A, B, EOS], [Q, EOS, ASSISTANT, A, B, EOS, None]),
        (CHAT, WITH_BOS, False, [BOS, USER, Q, EOS, ASSISTANT, A, B, EOS], [None] * 4 + [A, B, EOS, None]),
        ({"text": "ab"}, TOKENIZER, False, [A, B, EOS], [B, EOS, None]),
        ({"text": "ab"}, WITH_BOS, False, [BOS, A, B, EOS], [A, B, EOS, None]),
        ({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, WITH_BOS, True, [5, 6, 7], [None, 7, None]),
    ],
)  # fmt: skip
def test_tokens_and_targets(
    tmp_path: Path,
    row: object,
    tokenizer: ByteTokenizer,
    train_on_prompt: bool,
    tokens: list[int],
    targets: list[int | None],
) -> None:
    reading = read(tmp_path, [row], tokenizer, train_on_prompt=train_on_prompt)
    assert reading.problems.listed == []
    assert documents(reading.dataset) == [(tokens, targets)]
    assert reading.dataset.num_tokens == len(tokens)
    assert reading.dataset.num_targets == sum(target is not None for target in targets)


def test_all_problems_of_a_file_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair("p", "c"), pair("p", ""), {"prompt": "p"}, CHAT, 5])
    with pytest.raises(DataError) as caught:
        load_dataset(path, TOKENIZER, options())
    assert [problem.split(":")[1] for problem in caught.value.problems] == ["2", "3", "4", "5"]


def test_problems_beyond_the_limit_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair("p", "c")] + [pair("p", "")] * 50)
    with pytest.raises(DataError, match="50 problems") as caught:
        load_dataset(path, TOKENIZER, options())
    assert len(caught.value.problems) == 20
    assert "a.jsonl:21: `completion` is empty\n  and 30 more" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}, CHAT["messages"][1]]}, "role 'narrator' is not known to the template"),
        ({"input_ids": [1, 261]}, "token 261 is not in the model's vocabulary of 261: made with another tokenizer?"),
        ({"input_ids": [BOS, BOS, 1]}, "two begin-of-text tokens at its start"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "no trained token"),
        (pair("\ud800", "x"), "half of a surrogate pair (\\ud800 ... \\udfff) in its text"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_tokenized(tmp_path: Path, row: object, message: str) -> None:
    assert read(tmp_path, [row], WITH_BOS).problems.listed == [f"a.jsonl:1: {message}"]


def test_a_repeated_bos_is_no_fault_where_turns_begin_with_it(tmp_path: Path) -> None:
    assert read(tmp_path, [{"input_ids": [BOS, BOS, 1]}]).problems.count == 0


def test_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path, []).problems.listed == ["a.jsonl: no rows"]


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no end-of-text token"):
        read(tmp_path, [CHAT], ByteTokenizer(eos_ids=()))


def test_an_unsafe_conversation_stops_with_its_row(tmp_path: Path) -> None:
    class Unsafe(ByteTokenizer):
        def encode_chats(self, conversations: object) -> list[object]:  # type: ignore[override]
            return [UnsafeArtifactError("it did not finish", hint="Use another.")]

    with pytest.raises(UnsafeArtifactError, match=r"a\.jsonl:1: it did not finish"):
        read(tmp_path, [CHAT], Unsafe())


def test_an_unsafe_template_stops_with_the_rows_it_was_given(tmp_path: Path) -> None:
    class Unsafe(ByteTokenizer):
        def encode_chats(self, conversations: object) -> list[object]:  # type: ignore[override]
            raise UnsafeArtifactError("it did not finish", hint="Use another.")

    with pytest.raises(UnsafeArtifactError, match=r"a\.jsonl:1 to a\.jsonl:3: it did not finish"):
        read(tmp_path, [CHAT] * 3, Unsafe())


def test_faults_keep_the_order_of_the_file_across_portions(tmp_path: Path) -> None:
    rows: list[object] = [pair("p", "c")] * 700
    faulty = {
        3: 5,
        200: pair("p", ""),
        255: pair("\ud800", "x"),
        256: CHAT,
        257: "x",
        699: pair("p", ""),
    }
    for place, row in faulty.items():
        rows[place - 1] = row
    reading = read(tmp_path, rows)
    assert [int(problem.split(":")[1]) for problem in reading.problems.listed] == list(faulty)
    assert len(reading.dataset) == 700 - len(faulty)


LONG = [pair("p", "abcdefgh"), pair("p ", "ab"), pair("pqrstuvw", "ab")]


def test_rows_of_more_than_the_maximum_are_refused_by_default(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(write(tmp_path / "a.jsonl", LONG), TOKENIZER, options(max_length=6))
    assert caught.value.problems == (
        "a.jsonl:1: 10 tokens, more than data.max_length = 6",
        "a.jsonl:3: 11 tokens, more than data.max_length = 6",
    )
    assert "2 rows are too long: raise data.max_length" in caught.value.hint


def test_dropped_rows_are_counted_and_named(tmp_path: Path) -> None:
    dropping = options(max_length=6, overlong=Overlong.DROP)
    reading = load_dataset(write(tmp_path / "a.jsonl", LONG), TOKENIZER, dropping)
    assert len(reading.dataset) == 1
    assert reading.notices()[0] == (
        "2 of 3 rows are longer than 6 tokens and were dropped (21 tokens lost): "
        "a.jsonl:1 (10 tokens), a.jsonl:3 (11 tokens)"
    )


def test_truncated_rows_are_counted_and_refused_without_targets(tmp_path: Path) -> None:
    reading = read(tmp_path, LONG, max_length=6, overlong=Overlong.TRUNCATE)
    assert documents(reading.dataset)[0] == (list(b"pabcde"), [*b"abcde", None])
    assert reading.problems.listed == ["a.jsonl:3: no trained token within data.max_length = 6"]
    assert (reading.overlong.count, reading.num_lost_tokens) == (2, 9)


def test_pairs_that_run_together_are_reported_once_with_a_count(tmp_path: Path) -> None:
    rows = [pair("p", "c"), pair("p ", "c"), pair("p", "\nc"), pair("", "c"), pair("q", "c")]
    reading = read(tmp_path, rows)
    (notice,) = reading.notices()
    assert notice.startswith("in 2 of 5 rows the prompt does not end")
    assert notice.endswith(": a.jsonl:1, a.jsonl:5")


def test_ignored_fields_and_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("")
    write(tmp_path / "a.jsonl", [{**pair("p ", "c"), "id": 1}])
    reading = read_dataset(tmp_path, TOKENIZER, options())
    assert reading.notices() == [
        "fields that are not used: id",
        "files of unknown kind, not read: notes.md",
    ]


def test_plain_text_is_one_stream_in_which_every_token_but_the_first_is_predicted_once(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdef")
    reading = read_dataset(path, WITH_BOS, options(max_length=3))
    assert documents(reading.dataset) == [
        ([BOS, *b"ab"], [*b"abc"]),
        ([*b"cde"], [*b"def"]),
        ([*b"f", EOS], [EOS, None]),
    ]
    assert [str(reading.dataset.origin(d)) for d in range(3)] == [
        "a.txt:token 0", "a.txt:token 3", "a.txt:token 6",
    ]  # fmt: skip
    assert str(reading.cut) == "a.txt:token 0"


@given(st.integers(1, 40), st.integers(2, 12))
def test_cutting_loses_no_target(num_characters: int, max_length: int) -> None:
    builder = StoreBuilder()
    ids = list(range(num_characters + 1))
    builder.add_cut(ids, max_length, Origin("a", 0, "token"), row_digest=0, prompt_digest=0)
    store = builder.build()
    found = []
    for start, end in zip(store.starts, store.ends, strict=True):
        assert 1 <= end - start <= max_length
        found += [int(store.tokens[i + 1]) for i in range(start, end) if store.has_target[i]]
    assert found == ids[1:]
    assert (store.num_targets > 0).all()


def test_long_texts_in_rows_are_cut_and_keep_their_row(tmp_path: Path) -> None:
    reading = read(tmp_path, [{"text": "abcdef"}, {"text": "ab"}], max_length=3)
    assert [str(reading.dataset.origin(d)) for d in range(3)] == [
        "a.jsonl:1",
        "a.jsonl:1",
        "a.jsonl:2",
    ]
    assert reading.dataset.num_targets == 6 + 2
    assert reading.cut.first == ["a.jsonl:1"]


@pytest.mark.parametrize("portion", [1, 7, 64, 1 << 20])
def test_reading_text_in_portions_changes_nothing(
    tmp_path: Path, portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "ab\ncd\n\n ef\ngh\r\nij\n\tk\nl" * 5
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(text_files, "PORTION_CHARACTERS", portion)
    portions: list[str] = []

    class Recorder(ByteTokenizer):
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            portions.extend(texts)
            return super().encode_batch(texts)

    reading = read_dataset(tmp_path / "a.txt", Recorder(), options(max_length=1000))
    assert documents(reading.dataset)[0][0] == [*text.encode(), EOS]
    assert "".join(portions) == text
    assert (len(portions) > 1) == (portion < len(text))
    for before, after in pairwise(portions):
        assert before.endswith("\n")
        if after[0] == " ":
            assert not after[1].isspace()
        else:
            assert not before[-2].isspace()
            assert not after[0].isspace()


def test_text_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\n")
    (tmp_path / "b.txt").write_bytes(b" \n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    reading = read_dataset(tmp_path, TOKENIZER, options())
    assert [problem.partition(": dam")[0] for problem in reading.problems.listed] == [
        "a.txt:2: not UTF-8 text at byte 4", "a.txt: no text", "b.txt: no text", "c.txt.gz", "c.txt.gz: no text",
    ]  # fmt: skip


def test_text_files_are_in_no_other_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    reading = read_dataset(tmp_path, TOKENIZER, options(format=Format.MESSAGES))
    assert reading.problems.listed == ["a.txt: plain text is not in the format messages"]


def test_fingerprint_is_of_content_and_order_not_of_the_file(tmp_path: Path) -> None:
    rows = [pair("p ", "1"), pair("q ", "2")]
    fingerprint = read(tmp_path, rows).fingerprint
    with (tmp_path / "b.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "c.json").write_text(json.dumps([{**row, "id": 7} for row in rows]))
    for name in ("b.csv", "c.json"):
        assert read_dataset(tmp_path / name, TOKENIZER, options()).fingerprint == fingerprint
    assert read(tmp_path, rows[::-1]).fingerprint != fingerprint
    assert read(tmp_path, [rows[0], pair("q ", "3")]).fingerprint != fingerprint


def test_fingerprint_of_a_dataset_is_of_what_is_trained_on(tmp_path: Path) -> None:
    rows = [pair("p ", "1"), pair("q ", "2")]
    fingerprints = {
        read(tmp_path, rows).dataset.fingerprint,
        read(tmp_path, rows, train_on_prompt=True).dataset.fingerprint,
        read(tmp_path, rows, WITH_BOS).dataset.fingerprint,
        read(tmp_path, rows[:1]).dataset.fingerprint,
    }
    assert len(fingerprints) == 4
    assert read(tmp_path, rows).dataset.fingerprint in fingerprints


def test_duplicates_are_counted(tmp_path: Path) -> None:
    dataset = read(tmp_path, [pair("p", "c"), pair("p", "d"), pair("p", "c")]).dataset
    assert dataset.num_duplicates() == 1


def test_progress_counts_rows(tmp_path: Path) -> None:
    seen: list[int] = []
    path = write(tmp_path / "a.jsonl", [pair("p", "c")] * 600)
    read_dataset(path, TOKENIZER, options(), progress=seen.append)
    assert seen == [256, 512]


def test_a_maximum_without_room_for_a_target() -> None:
    with pytest.raises(ConfigError, match="at least 2 expected, found 1"):
        options(max_length=1)

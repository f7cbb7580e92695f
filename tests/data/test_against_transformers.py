"""Tokens and masks of whole data sets against transformers, on small and on real data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.fake_tokenizer import options
from halfbyte.data import text_files
from halfbyte.data.dataset import Dataset, split_by_prompt
from halfbyte.data.formats import Format
from halfbyte.data.packing import PackingOptions
from halfbyte.data.read import load_dataset
from halfbyte.data.sources import find_sources
from halfbyte.data.steps import StepStream
from halfbyte.errors import UsageError
from halfbyte.text.tokenizer import Tokenizer
from tiny_tokenizers import write_model

transformers = pytest.importorskip("transformers")

TAGGED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    [("user", "the cat"), ("assistant", "sat on the mat")],
    [("system", "you are a cat"), ("user", "12"), ("assistant", "héé"), ("user", "345"), ("assistant", "a\n\nb")],
]  # fmt: skip
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}


def load(directory: Path) -> tuple[Tokenizer, Any]:
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    return Tokenizer.load(directory), theirs


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def document(dataset: Dataset, number: int) -> tuple[list[int], list[int]]:
    """Tokens and labels, each label under its own token as in transformers."""
    store = dataset.store
    start, end = int(store.starts[number]), int(store.ends[number])
    ids = store.tokens[start:end].tolist()
    predicted = [False, *store.has_target[start : end - 1].tolist()]
    return ids, [token if on else -100 for token, on in zip(ids, predicted, strict=True)]


def as_messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_conversations(tmp_path: Path, name: str) -> None:
    ours, theirs = load(write_model(tmp_path / "model", template=TAGGED))
    rows = [
        {"messages": as_messages(turns)}
        if name == "messages"
        else {"conversations": [{"from": SPEAKERS[r], "value": c} for r, c in turns]}
        for turns in TURNS
    ]
    reading = load_dataset(write(tmp_path / "a.jsonl", rows), ours, options())
    for number, turns in enumerate(TURNS):
        expected = theirs.apply_chat_template(
            as_messages(turns), return_assistant_tokens_mask=True, return_dict=True
        )
        ids, labels = document(reading.dataset, number)
        assert ids == expected["input_ids"]
        assert [label != -100 for label in labels] == [bool(m) for m in expected["assistant_masks"]]


def test_alpaca(tmp_path: Path) -> None:
    ours, theirs = load(write_model(tmp_path / "model", template=TAGGED))
    row = {"instruction": "the cat", "input": "12", "output": "sat"}
    reading = load_dataset(write(tmp_path / "a.jsonl", [row]), ours, options())
    expected = theirs.apply_chat_template(
        as_messages([("user", "the cat\n\n12"), ("assistant", "sat")]),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    ids, labels = document(reading.dataset, 0)
    assert ids == expected["input_ids"]
    assert [label != -100 for label in labels] == [bool(m) for m in expected["assistant_masks"]]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_raw_pairs(tmp_path: Path, kind: str) -> None:
    ours, theirs = load(write_model(tmp_path / "model", kind))
    pairs = [("the cat ", "sat"), ("héé 日本\n", " on the mat\n"), ("", "you")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    reading = load_dataset(write(tmp_path / "a.jsonl", rows), ours, options())
    for number, (prompt, completion) in enumerate(pairs):
        before = theirs(prompt).input_ids  # with <s> for the sentencepiece kind
        after = [*theirs(completion, add_special_tokens=False).input_ids, theirs.eos_token_id]
        expected = [-100] * len(before) + after
        ids, labels = document(reading.dataset, number)
        assert ids == before + after
        assert labels[1:] == expected[1:]  # nothing predicts the first token


def test_conversations_for_a_model_without_a_chat_template(tmp_path: Path) -> None:
    ours = Tokenizer.load(write_model(tmp_path / "model", template=None))
    path = write(tmp_path / "a.jsonl", [{"messages": as_messages(turns)} for turns in TURNS])
    with pytest.raises(UsageError, match="has no chat template"):
        load_dataset(path, ours, options())


@pytest.fixture
def shared_data() -> Path:
    for parent in Path(__file__).parents:
        if (parent / "shared" / "data" / "e2e_nlg").is_dir():
            return parent / "shared" / "data"
    pytest.skip("no shared/data beside the checkout")


def test_e2e_nlg(tmp_path: Path, shared_data: Path) -> None:
    ours, theirs = load(write_model(tmp_path / "model"))
    path = shared_data / "e2e_nlg" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    dataset = load_dataset(path, ours, options()).dataset
    assert len(dataset) == len(rows)
    num_tokens = num_targets = 0
    for name, prompt_side in (("prompt", True), ("completion", False)):
        encoded = theirs([row[name] for row in rows], add_special_tokens=False).input_ids
        num_tokens += sum(map(len, encoded))
        num_targets += 0 if prompt_side else sum(map(len, encoded)) + len(rows)
    assert (dataset.num_tokens, dataset.num_targets) == (num_tokens + len(rows), num_targets)
    train, held_out = split_by_prompt(dataset, 0.1)
    sides = [{rows[d]["prompt"] for d in side.index.tolist()} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    # A prompt has 7 rows on average, so the fraction is met to within a few of them.
    assert len(held_out) == pytest.approx(len(rows) / 10, abs=30)
    stream = StepStream(train, PackingOptions(4096, 1024))
    seen: list[str] = []
    for _ in range(stream.num_steps(0)):
        seen += [row for batch in next(stream).micro_batches for row in batch.rows]
    assert sorted(seen) == sorted(str(train.origin(d)) for d in range(len(train)))


def test_gsm8k_raw_and_through_the_template(tmp_path: Path, shared_data: Path) -> None:
    ours, _ = load(write_model(tmp_path / "model"))
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()[:100]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    raw = load_dataset(tmp_path / "a.jsonl", ours, options())
    assert raw.choice is not None
    assert raw.choice.fields == ("question", "answer")
    assert raw.unseparated.count == 100
    chat = load_dataset(tmp_path / "a.jsonl", ours, options(format=Format.ALPACA))
    answers = [json.loads(line)["answer"] for line in lines]
    store = chat.dataset.store
    for number, answer in enumerate(answers):
        _, labels = document(chat.dataset, number)
        trained = [label for label in labels if label != -100]
        assert ours.decode(trained, skip_special=False) == answer + "<|im_end|>"
    assert int(store.num_targets.sum()) == raw.dataset.num_targets


def test_wikitext_in_portions_is_the_whole(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = load(write_model(tmp_path / "model"))
    path = tmp_path / "a.txt"
    text = (shared_data / "wikitext2" / "test.txt").read_text()[:200_000]
    # transformers takes a typed <unk> for the token; we do not.
    path.write_text(text.replace("<unk>", "unk"))
    monkeypatch.setattr(text_files, "PORTION_CHARACTERS", 5_000)
    portions = list(text_files._portions(find_sources(path).files[0]))
    assert len(portions) > 30
    dataset = load_dataset(path, ours, options(max_length=512)).dataset
    expected = [*theirs(path.read_text(), add_special_tokens=False).input_ids, theirs.eos_token_id]
    assert np.array_equal(dataset.store.tokens, expected)
    assert dataset.num_targets == len(expected) - 1

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import FormatError, MissingFileError, UsageError
from halfbyte.text.tokenizer import Tokenizer
from tiny_tokenizers import SPECIAL, write_model

Build = Callable[..., Path]

TEXTS = [
    "",
    " ",
    "the cat",
    "  the\n\ncat ",
    "héé 日本 👍🏽",
    "12 345",
    "</s",
    "a<|im_end|b",
    "\x00\n\t",
]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers(build: Build, kind: str, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    directory = build(kind)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    ours = Tokenizer.load(directory)
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == theirs.decode(
        ours.encode(text), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("name", SPECIAL)
def test_typed_names_of_special_tokens_stay_text(build: Build, kind: str, name: str) -> None:
    tokenizer = Tokenizer.load(build(kind))
    text = f"a{name} b {name}{name}"
    special = set(tokenizer.special.ids.values()) - {tokenizer.special.ids["<unk>"]}
    assert not special & set(tokenizer.encode(text, bos=False))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    allowed = tokenizer.encode(text, allow_special=True)
    assert allowed.count(tokenizer.special.ids[name]) >= 3


def test_a_vocabulary_that_looks_up_whole_words_gives_no_special_token(
    build: Build, tmp_path: Path
) -> None:
    directory = build()
    path = directory / "tokenizer.json"
    description = json.loads(path.read_text())
    description["model"]["ignore_merges"] = True
    description["pre_tokenizer"] = None
    path.write_text(json.dumps(description))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.special.ids["</s>"] not in tokenizer.encode("</s>")


def test_the_bos_token_is_added_by_rule_and_once(build: Build) -> None:
    plain, adding = Tokenizer.load(build()), Tokenizer.load(build("sentencepiece"))
    assert (plain.adds_bos, adding.adds_bos) == (False, True)
    assert plain.encode("a")[0] != plain.bos_id
    assert plain.encode("a", bos=True)[0] == plain.bos_id
    assert adding.encode("a", bos=False)[0] != adding.bos_id
    assert adding.encode("<s>a", allow_special=True).count(0) == 1
    config = {"add_bos_token": True}
    assert Tokenizer.load(build(config=config)).adds_bos


def test_eos_ids_come_from_all_files(build: Build) -> None:
    tokenizer = Tokenizer.load(
        build(generation_config={"eos_token_id": [4, 1]}, special_tokens_map={})
    )
    assert tokenizer.eos_ids == (1, 4)


def test_the_fingerprint_sees_every_part(build: Build) -> None:
    directories = [
        build(),
        build("sentencepiece"),
        build(template="no-opening"),
        build(template=None),
        build(config={"add_bos_token": True}),
        build(generation_config={"eos_token_id": 4}),
    ]
    prints = [Tokenizer.load(d).fingerprint for d in directories]
    assert len(set(prints)) == len(prints)
    reformatted = build()
    path = reformatted / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3, sort_keys=True))
    assert Tokenizer.load(reformatted).fingerprint == prints[0]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", b"\xff", "not UTF-8 at byte 0"),
        ("tokenizer_config.json", "[1]", "a JSON object expected, found list"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", "[" * 100_000, "nested deeper than 64"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token: the name of a token"),
        ("tokenizer_config.json", '{"eos_token": "<none>"}', "'<none>' is not in the vocabulary"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "true or false expected"),
        ("tokenizer_config.json", '{"add_bos_token": true}', "no file names a bos_token"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template: text expected"),
        ("tokenizer_config.json", '{"chat_template": [3]}', "`name` and `template`"),
        ("tokenizer_config.json", '{"additional_special_tokens": 3}', "a list of token names"),
        ("generation_config.json", '{"eos_token_id": "x"}', "token ids expected"),
        ("generation_config.json", '{"eos_token_id": 100000}', "ids below"),
    ],
)
def test_damaged_files_are_named(
    build: Build, file: str, content: str | bytes, message: str
) -> None:
    directory = build(template=None)
    data = content if isinstance(content, bytes) else content.encode()
    (directory / file).write_bytes(data)
    with pytest.raises(FormatError, match=message):
        Tokenizer.load(directory)


def test_all_faults_are_listed(build: Build) -> None:
    directory = build(
        config={"eos_token": 1, "bos_token": []}, generation_config={"eos_token_id": -1}
    )
    with pytest.raises(FormatError, match="3 problems"):
        Tokenizer.load(directory)


def test_a_file_that_is_too_large_is_not_read(build: Build) -> None:
    directory = build()
    with (directory / "tokenizer.json").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(FormatError, match="bytes expected"):
        Tokenizer.load(directory)


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_text_without_an_encoding_is_refused(build: Build) -> None:
    with pytest.raises(UsageError, match="U\\+D800, at character 2"):
        Tokenizer.load(build()).encode("ab\ud800")


def test_bos_of_a_model_without_one(build: Build) -> None:
    tokenizer = Tokenizer.load(build(config={"bos_token": None}))
    with pytest.raises(UsageError, match="no beginning-of-text token"):
        tokenizer.encode("a", bos=True)


def test_tokens_have_names(build: Build) -> None:
    tokenizer = Tokenizer.load(build())
    assert tokenizer.token(1) == "</s>"
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(UsageError, match="ids below"):
            tokenizer.token(bad)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:

    root = tmp_path_factory.mktemp("models")
    return [
        Tokenizer.load(write_model(root / kind, kind)) for kind in ("byte-level", "sentencepiece")
    ]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_streamed_pieces_join_to_the_text(tokenizers: list[Tokenizer], data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from(tokenizers))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    skip = data.draw(st.booleans())
    stream = tokenizer.decode_stream(skip_special=skip)
    pieces = [stream.push(i) for i in ids]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids, skip_special=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_text_survives_encoding(tokenizers: list[Tokenizer], text: str) -> None:
    for tokenizer in tokenizers:
        ids: list[Any] = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text


def test_a_stream_gives_text_early_and_never_half_characters(tokenizers: list[Tokenizer]) -> None:
    stream = tokenizers[0].decode_stream()
    pieces = [stream.push(i) for i in tokenizers[0].encode("the cat 日")]
    assert pieces[0] == "the"
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == "the cat 日"
    half = tokenizers[0].encode("日")[:1]
    assert [stream.push(i) for i in half] == [""]
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_many_texts_at_once_are_the_same(build: Build, kind: str) -> None:
    tokenizer = Tokenizer.load(build(kind))
    texts = ["the cat", "", "typed </s> token", "héé 日本", " sat\n\n", "the cat"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text, bos=False) for text in texts]
    assert tokenizer.encode_batch([]) == []
    with pytest.raises(UsageError, match="surrogate"):
        tokenizer.encode_batch(["fine", "\ud800"])

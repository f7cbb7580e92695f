"""Tokenizers from GGUF vocabularies: the rules restated, against a plain reading of llama.cpp's."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_gguf as tiny
from halfbyte.errors import FormatError, HalfbyteError, UnsupportedError
from halfbyte.formats.gguf_file import GgufFile
from halfbyte.models.gguf_tokenizer import WORD_RULES, end_ids, tokenizer_files
from halfbyte.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6

PIECES = ["▁", "a", "b", "t", "h", "e", "▁t", "he", "▁the", "th", "▁a", "ab", "ba", "aba", "\n"]
SPM = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES, "  ", "<user>"]
SPM_KINDS = [UNKNOWN, CONTROL, CONTROL, *([BYTE] * 256), *([NORMAL] * len(PIECES)), USER, USER]
SCORES = [0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [0.0, 0.0]


def spm(**changes: tiny.Typed) -> dict[str, tiny.Typed]:
    pairs: dict[str, tiny.Typed] = {
        "general.architecture": ("str", "llama"),
        "model": ("str", "llama"),
        "tokens": ("[str", SPM),
        "token_type": ("[i32", SPM_KINDS),
        "scores": ("[f32", SCORES),
        "bos_token_id": ("u32", 1),
        "eos_token_id": ("u32", 2),
        "unknown_token_id": ("u32", 0),
    }
    return prefixed(pairs | changes)


def prefixed(pairs: dict[str, tiny.Typed]) -> dict[str, tiny.Typed]:
    return {k if "." in k else f"tokenizer.ggml.{k}": v for k, v in pairs.items()}


def byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for bytes, in the order of the bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


LETTERS = byte_letters()
MERGES = ["t h", "th e", "Ġ the", "1 2", "a b", "- -", "Ċ Ċ"]
BPE = [*LETTERS, *(m.replace(" ", "") for m in MERGES), "<|end|>", "<|im_end|>"]


def bpe(pre: str = "gpt-2", **changes: tiny.Typed) -> dict[str, tiny.Typed]:
    pairs: dict[str, tiny.Typed] = {
        "general.architecture": ("str", "llama"),
        "model": ("str", "gpt2"),
        "pre": ("str", pre),
        "tokens": ("[str", BPE),
        "token_type": ("[i32", [NORMAL] * (len(BPE) - 2) + [CONTROL] * 2),
        "merges": ("[str", MERGES),
        "eos_token_id": ("u32", len(BPE) - 2),
        "bos_token_id": ("u32", len(BPE) - 1),
    }
    return prefixed(pairs | changes)


def convert(directory: Path, pairs: dict[str, tiny.Typed]) -> Tokenizer:
    directory.mkdir(exist_ok=True)
    (directory / "m.gguf").write_bytes(tiny.build(pairs))
    for name, text in tokenizer_files(GgufFile.open(directory / "m.gguf")).items():
        (directory / name).write_text(text)
    return Tokenizer.load(directory)


def merge_by_score(text: str) -> list[int]:
    """llama.cpp's SentencePiece rule, step by step: the best pair first, the leftmost of equals."""
    ids = {piece: i for i, piece in enumerate(SPM)}
    symbols = list(text)
    while True:
        pairs = [
            (-SCORES[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    out = []
    for symbol in symbols:
        out += [ids[symbol]] if symbol in ids else [3 + b for b in symbol.encode()]
    return out


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    pairs = spm(add_space_prefix=("bool", False))
    return convert(tmp_path_factory.mktemp("spm"), pairs)


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab the\né", max_size=20))
def test_pieces_merge_by_score(sentencepiece: Tokenizer, text: str) -> None:
    # Two spaces are a user-defined token, which is found before anything merges.
    expected: list[int] = []
    for i, part in enumerate(text.split("  ")):
        expected += [SPM.index("  ")] if i else []
        expected += merge_by_score(part.replace(" ", "▁"))
    assert sentencepiece.encode(text, bos=False) == expected
    assert sentencepiece.decode(expected) == text


def test_the_space_in_front_and_the_bos_token(tmp_path: Path) -> None:
    tokenizer = convert(tmp_path / "default", spm())
    the = SPM.index("▁the")
    assert tokenizer.encode("the") == [1, the]  # both are SentencePiece's habit
    assert tokenizer.decode([1, the]) == "the"
    plain = convert(tmp_path / "plain", spm(add_bos_token=("bool", False)))
    assert plain.encode("the") == [the]
    assert tokenizer.encode("<user>")[-1] == SPM.index("<user>")
    assert SPM.index("</s>") not in tokenizer.encode("</s>")


def test_bytes_and_merges(tmp_path: Path) -> None:
    tokenizer = convert(tmp_path, bpe())
    assert [tokenizer.token(i) for i in tokenizer.encode("the the12 日\n")] == [
        "the", "Ġthe", "12", "Ġ", "æ", "Ĺ", "¥", "Ċ",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("the 日 12\n\n")) == "the 日 12\n\n"
    assert len(BPE) - 1 not in tokenizer.encode("<|im_end|>")


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "ab12 345", ["ab", "12", " ", "3", "4", "5"]),
        ("smollm", "ab12 345", ["ab", "1", "2", " ", "3", "4", "5"]),
        ("llama-bpe", "a12345", ["a", "12", "3", "4", "5"]),
        ("qwen2", "a12", ["a", "1", "2"]),
        ("tekken", "a12", ["a", "1", "2"]),
        ("default", "a--12", ["a", "--", "12"]),
        ("qwen2", "a\n\nb", ["a", "\n\n", "b"]),
        ("gpt-2", "a\n\nb", ["a", "\n", "\n", "b"]),
        ("qwen2", "e\u0301", ["Ã", "©"]),
    ],
)
def test_words_are_cut_by_rule(tmp_path: Path, pre: str, text: str, words: list[str]) -> None:
    tokenizer = convert(tmp_path, bpe(pre))
    found = [
        tokenizer.token(i).replace("Ġ", " ").replace("Ċ", "\n")
        for i in tokenizer.encode(text, bos=False)
    ]
    assert found == words


@pytest.mark.parametrize("pre", WORD_RULES)
def test_every_rule_keeps_every_character(tmp_path: Path, pre: str) -> None:
    tokenizer = convert(tmp_path, bpe(pre))
    for text in ("the  12345,\n\n x\t<|end|> 'LL don't 日本 ½ --- ", " ", "\r\n", ""):
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
    assert tokenizer.adds_bos == WORD_RULES[pre].adds_bos


def test_templates_and_ends(tmp_path: Path) -> None:
    template = {
        "tokenizer.chat_template": ("str", "{{ messages }}<|im_end|>"),
        "tokenizer.chat_template.tool_use": ("str", "b"),
        "llama.context_length": ("u32", 99),
    }
    tokenizer = convert(tmp_path, bpe(eot_token_id=("u32", 5)) | template)
    assert tokenizer.has_chat_template
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == [{"name": "tool_use", "template": "b"}]
    assert config["model_max_length"] == 99
    assert end_ids(GgufFile.open(tmp_path / "m.gguf")) == [len(BPE) - 2, 5, len(BPE) - 1]


@pytest.mark.parametrize(
    ("pairs", "kind", "message"),
    [
        (bpe("martian"), UnsupportedError, r"tokenizer\.ggml\.pre: one of default, .*'martian'"),
        (bpe() | {"tokenizer.ggml.pre": ("u32", 1)}, FormatError, "str expected"),
        (bpe(model=("str", "rwkv")), UnsupportedError, "gpt2 or llama expected, found 'rwkv'"),
        (bpe(tokens=("[str", [])), FormatError, "without vocabulary"),
        (bpe(tokens=("[str", ["a"] * len(BPE))), FormatError, "'a' appears twice"),
        (
            spm(tokens=("[str", [*SPM[:-1], "x" * 10**6])),
            FormatError,
            "at most 1024 characters each",
        ),
        (bpe(token_type=("[i32", [1])), FormatError, f"{len(BPE)} entries expected, found 1"),
        (bpe(eos_token_id=("u32", 9999)), FormatError, "eos_token_id: an id below"),
        (bpe(merges=("[str", ["t h", "q q"])), FormatError, "1 of 2 are not two tokens"),
        (bpe(merges=("[str", ["t h e"])), FormatError, "1 of 1 are not"),
        ({k: v for k, v in bpe().items() if "merges" not in k}, FormatError, "merges"),
        (spm(scores=("[f32", [0.0])), FormatError, "scores: 276 expected, found 1"),
        ({k: v for k, v in spm().items() if "scores" not in k}, FormatError, "found none"),
        (
            prefixed(
                {
                    "general.architecture": ("str", "llama"),
                    "model": ("str", "llama"),
                    "tokens": ("[str", ["a"]),
                    "scores": ("[f32", [0.0]),
                }
            ),
            FormatError,
            "neither an unknown token nor 256 byte tokens",
        ),
    ],
)
def test_vocabularies_that_cannot_be_used(
    tmp_path: Path, pairs: dict[str, tiny.Typed], kind: type[HalfbyteError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        convert(tmp_path, pairs)

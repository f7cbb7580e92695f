"""The tokenizer inside a GGUF file, written as `tokenizer.json` and its configs.

GGUF holds a vocabulary and names the rules around it; llama.cpp has the rules in its code. They
are restated here for the `tokenizers` library, so that ids equal llama.cpp's:

  - `gpt2` vocabularies: byte-level BPE with merges; `tokenizer.ggml.pre` names how text is cut
    into words first. An unknown name is an error: a guess would give other ids.
  - `llama` vocabularies (SentencePiece): pairs merge by the score of the result, which is BPE
    with merges ordered by score; characters without a piece become byte tokens.

Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp (rules and names).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halfbyte.errors import FormatError, UnsupportedError
from halfbyte.formats.gguf_file import GgufFile

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
# Real vocabularies stay far below; trying every cut of a longer token would take forever.
MAX_TOKEN_CHARACTERS = 1024
MAX_CHARACTERS = 8 << 20
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"

Json = Mapping[str, object]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class WordRule:
    """How text is cut into words before merges apply.

    Attributes:
        patterns: Applied one after the other; what matches and what lies between are words.
        whole_words: A word that is a token needs no merges (`ignore_merges`).
        adds_bos: Whether text starts with bos where the file does not say.
        nfc: Whether the model's own tokenizer composes characters first. llama.cpp leaves that
            out, so ids differ from its for text that is not composed.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False
    nfc: bool = False


_DIGITS_APART = WordRule((r"\p{N}", _GPT2))
_PLAIN = WordRule((_GPT2,))

WORD_RULES: dict[str, WordRule] = {
    "default": WordRule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "exaone4"), _PLAIN),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS_APART
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"),
        WordRule((_LLAMA3,), whole_words=True, adds_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), WordRule((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), WordRule((_QWEN2,), nfc=True)),
    **dict.fromkeys(("stablelm2", "megrez"), WordRule((_QWEN2,))),
    "tekken": WordRule((_TEKKEN,), whole_words=True, adds_bos=True),
}
"""Value of `tokenizer.ggml.pre` -> rule."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a file.

    Attributes:
        tokens: Text of each id.
        kinds: Type of each id: normal, control, user-defined, byte, ...
        roles: `bos_token`, `eos_token`, ... -> id.
        adds_bos: Whether text starts with bos, where the file says so.
    """

    tokens: list[str]
    kinds: list[int]
    roles: Mapping[str, int]
    adds_bos: bool | None


def tokenizer_files(file: GgufFile) -> dict[str, str]:
    """Name -> text of the tokenizer's files: tokenizer.json, tokenizer_config.json, template.

    Raises:
        UnsupportedError: A kind of vocabulary or a rule for words that is not known.
        FormatError: The vocabulary contradicts itself; all faults are listed.
    """
    vocabulary = _read_vocabulary(file)
    kind = file.get("tokenizer.ggml.model", str)
    if kind == "gpt2":
        description, adds_bos = _byte_level(file, vocabulary)
    elif kind == "llama":
        description, adds_bos = _sentencepiece(file, vocabulary)
    else:
        raise UnsupportedError(
            f"{file.path}: tokenizer.ggml.model: gpt2 or llama expected, found {kind!r}",
            hint="Take the tokenizer files from the model's Hugging Face directory.",
        )
    if vocabulary.adds_bos is not None:
        adds_bos = vocabulary.adds_bos
    names = {role: vocabulary.tokens[i] for role, i in vocabulary.roles.items()}
    if adds_bos and "bos_token" in names:
        description["post_processor"] = _starting_with(
            names["bos_token"], vocabulary.roles["bos_token"]
        )
    config: dict[str, object] = {
        **names,
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    context = file.get(f"{file.get('general.architecture', str)}.context_length", int)
    if context is not None:
        config["model_max_length"] = context
    files = {"tokenizer.json": json.dumps(description, ensure_ascii=False) + "\n"}
    files |= _templates(file, config)
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    return files


def end_ids(file: GgufFile) -> list[int]:
    """Ids that end a text or a turn, those of the file and those its chat template closes with."""
    keys = ("eos", "eot", "eom")
    ids = [file.get(f"tokenizer.ggml.{key}_token_id", int) for key in keys]
    tokens = file.get_list("tokenizer.ggml.tokens", str) or []
    template = file.get("tokenizer.chat_template", str) or ""
    closing = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
    ids += [tokens.index(name) for name in closing if name in template and name in tokens]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _templates(file: GgufFile, config: dict[str, object]) -> dict[str, str]:
    """The default template is a file of its own, named ones are a list in the config."""
    key = "tokenizer.chat_template"
    named = [
        {"name": name.removeprefix(f"{key}."), "template": source}
        for name, source in file.metadata.items()
        if name.startswith(f"{key}.") and isinstance(source, str)
    ]
    if named:
        config["chat_template"] = named
    template = file.get(key, str)
    return {} if template is None else {"chat_template.jinja": template}


def _read_vocabulary(file: GgufFile) -> Vocabulary:
    tokens = file.get_list("tokenizer.ggml.tokens", str)
    if not tokens:
        raise FormatError(
            f"{file.path}: it has no tokenizer.ggml.tokens: a file without vocabulary"
        )
    kinds = file.get_list("tokenizer.ggml.token_type", int) or [1] * len(tokens)
    problems: list[str] = []
    if len(kinds) != len(tokens):
        problems.append(f"token_type: {len(tokens)} entries expected, found {len(kinds)}")
    longest, total = max(map(len, tokens)), sum(map(len, tokens))
    if longest > MAX_TOKEN_CHARACTERS or total > MAX_CHARACTERS:
        problems.append(
            f"tokens: at most {MAX_TOKEN_CHARACTERS} characters each and {MAX_CHARACTERS} in all "
            f"expected, found {longest} and {total}"
        )
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        again = next(t for t in tokens if t in seen or seen.add(t))  # type: ignore[func-returns-value]
        problems.append(f"tokens: {again!r:.60} appears twice")
    roles: dict[str, int] = {}
    for role, key in (
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("unk_token", "unknown"),
        ("pad_token", "padding"),
    ):
        token_id = file.get(f"tokenizer.ggml.{key}_token_id", int)
        if token_id is None:
            continue
        if 0 <= token_id < len(tokens):
            roles[role] = token_id
        else:
            problems.append(f"{key}_token_id: an id below {len(tokens)} expected, found {token_id}")
    if problems:
        raise FormatError(f"{file.path}: unusable vocabulary", problems=problems)
    return Vocabulary(tokens, kinds, roles, file.get("tokenizer.ggml.add_bos_token", bool))


def _description(vocabulary: Vocabulary, model: Json) -> dict[str, object]:
    # User-defined tokens are found in raw text before anything else, as control tokens are.
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(vocabulary.tokens)},
            "merges": [],
            **model,
        },
    }


def _byte_level(file: GgufFile, vocabulary: Vocabulary) -> tuple[dict[str, object], bool]:
    pre = file.get("tokenizer.ggml.pre", str)
    if pre not in WORD_RULES:
        known = ", ".join(WORD_RULES)
        raise UnsupportedError(
            f"{file.path}: tokenizer.ggml.pre: one of {known} expected, found {pre!r}",
            hint="Take the tokenizer files from the model's Hugging Face directory.",
        )
    rule = WORD_RULES[pre]
    merges = file.get_list("tokenizer.ggml.merges", str)
    if merges is None:
        raise FormatError(f"{file.path}: it has no tokenizer.ggml.merges")
    pairs = [merge.split(" ") for merge in merges]
    known_tokens = set(vocabulary.tokens)
    wrong = [
        merge
        for merge, pair in zip(merges, pairs, strict=True)
        if len(pair) != 2 or not known_tokens.issuperset([*pair, "".join(pair)])  # noqa: PLR2004
    ]
    if wrong:
        raise FormatError(
            f"{file.path}: tokenizer.ggml.merges: {len(wrong)} of {len(merges)} are not two tokens "
            f"that make a third; the first is {wrong[0]!r:.60}"
        )
    description = _description(vocabulary, {"merges": pairs, "ignore_merges": rule.whole_words})
    splits = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in rule.patterns
    ]
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    description["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [*splits, {"type": "ByteLevel", **byte_level}],
    }
    description["decoder"] = {"type": "ByteLevel", **byte_level}
    if rule.nfc:
        description["normalizer"] = {"type": "NFC"}
    return description, rule.adds_bos


def _sentencepiece(file: GgufFile, vocabulary: Vocabulary) -> tuple[dict[str, object], bool]:
    scores = file.get_list("tokenizer.ggml.scores", float)
    if scores is None or len(scores) != len(vocabulary.tokens):
        found = "none" if scores is None else str(len(scores))
        raise FormatError(
            f"{file.path}: tokenizer.ggml.scores: {len(vocabulary.tokens)} expected, found {found}"
        )
    unknown = vocabulary.roles.get("unk_token")
    has_bytes = sum(bool(_BYTE.fullmatch(token)) for token in vocabulary.tokens) == 256  # noqa: PLR2004
    if unknown is None and not has_bytes:
        raise FormatError(f"{file.path}: neither an unknown token nor 256 byte tokens")
    model: dict[str, object] = {
        "merges": _merges_by_score(vocabulary, scores),
        "byte_fallback": has_bytes,
        "fuse_unk": True,
    }
    if unknown is not None:
        model["unk_token"] = vocabulary.tokens[unknown]
    description = _description(vocabulary, model)
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool) is not False
    spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    front: list[Json] = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    description["normalizer"] = {"type": "Sequence", "normalizers": [*front, *spaces]}
    strip: list[Json] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    description["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *strip,
        ],
    }
    return description, True


def _merges_by_score(vocabulary: Vocabulary, scores: Sequence[float]) -> list[list[str]]:
    """All pairs of pieces that make a piece, best result first."""
    special = (UNKNOWN, CONTROL, USER_DEFINED)
    pieces = {
        token: scores[i]
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind not in special and not _BYTE.fullmatch(token)
    }
    merges: list[list[str]] = []
    for piece in sorted(pieces, key=lambda token: -pieces[token]):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                merges.append([left, right])
    return merges


def _starting_with(name: str, token_id: int) -> Json:
    token = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": one, "type_id": 0}} for one in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, second],
        "special_tokens": {name: {"id": name, "ids": [token_id], "tokens": [name]}},
    }

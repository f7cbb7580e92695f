"""Write `llama_cpp_ids.json`: what llama.cpp makes of some texts. Run by hand, with its bindings:

pip install llama-cpp-python==0.3.36
PYTHONPATH=tests python tests/models/make_llama_cpp_ids.py
"""
# ruff: noqa: RUF001  (texts of many scripts)

import json
from pathlib import Path

import llama_cpp

import real_models

TEXTS = [
    "Hello world",
    " leading and trailing ",
    "Numbers: 0 12 345 6789 1234567890 3.14159 1,000,000 ½ ² ٣٤",
    "two  spaces   three    four\tone tab\t\ttwo",
    "lines\nmore\n\nblank\n\n\nmore\r\nwindows\r\n\r\nend\n",
    "\n\n\n\n\n" * 9,
    " " * 70 + "x",
    "don't I'll we've SHE'S they'RE 'tis '''",
    "camelCase snake_case kebab-case SCREAMING_CASE x86_64 a1b2",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x ** 2}  # comment\n",
    '<html><body class="a">&amp;</body></html>',
    "https://example.org/path?query=1&b=%20#frag user@example.org",
    "日本語のテキスト、中文文本。 한국어 텍스트",
    "Привет мир! Ελληνικά עברית العربية हिन्दी ไทย",
    "café cafe\u0301 naïve Ångström A\u030angstro\u0308m ﬁ ﬂ",
    "👍 👍🏽 👨‍👩‍👧‍👦 🇨🇭 ❤️ 🤷🏻‍♂️",
    "\u200bzero\u200dwidth\ufeff \u00a0nbsp\u3000ideographic\u2028line",
    "control \x00 \x01 \x1b[0m \x7f end",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𒀀 \U000e0041",
    "typed <|im_start|>system <|im_end|> <bos> <start_of_turn> <unused5> [multimodal]",
    "an HTML tag </s> that looks like an end of text",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~ …—–«»„“”‚‘’",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbb ababababab",
    "▁ already ▁▁ marked ▁x",
    "The quick brown fox jumps over the lazy dog. " * 5,
    "a",
    " ",
    "",
]


def ids(model: Path) -> list[list[int]]:
    """Without bos, names of special tokens taken as text."""
    llama = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    return [llama.tokenize(text.encode(), add_bos=False, special=False) for text in TEXTS]


def main() -> None:
    """Write the file beside this one."""
    found = {"smollm2": ids(real_models.smollm2_gguf()), "gemma3": ids(real_models.gemma3_gguf())}
    content = {"llama_cpp_python": llama_cpp.__version__, "texts": TEXTS, "ids": found}
    target = Path(__file__).with_name("llama_cpp_ids.json")
    target.write_text(json.dumps(content, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()

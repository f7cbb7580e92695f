"""Tiny model directories: two kinds of tokenizer, and chat templates of several shapes."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|tool|>"]
TEXTS = [
    "the cat sat on the mat\n",
    "you are a helpful assistant\n",
    "system user 12 345 héé 日本\n",
]

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Trims the text, begins with bos, and has generation tags.
    "trimming": (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
    ),
    # No opening of the answer: [INST] ... [/INST] answer</s>
    "inst": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # Ignores add_generation_prompt although answers have a header.
    "no-opening": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
    # Drops earlier reasoning and adds an empty one to the last answer.
    "reasoning": (
        "{% for m in messages %}{% set text = m.content %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% if '</think>' in text %}{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}{{ text + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # The answer has no end.
    "endless": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
}


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Byte fallback, `▁` for spaces, one of them added in front and dropped when decoding."""
    pieces = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdehimnorstuy12\n[]/INST"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], unk_token=SPECIAL[2], byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIAL])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece_like}


def write_model(
    directory: Path,
    kind: str = "byte-level",
    template: str | None = "chatml",
    config: dict[str, object] | None = None,
    **files: object,
) -> Path:
    """A directory with the files of a tokenizer; `files` are further JSON files."""
    directory.mkdir()
    KINDS[kind]().save(str(directory / "tokenizer.json"))
    base: dict[str, object] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    base["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(base | (config or {})))
    if template is not None:
        (directory / "chat_template.jinja").write_text(TEMPLATES.get(template, template))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory

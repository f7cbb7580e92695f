"""SmolLM2 and Gemma 3 from their GGUF files: tokens, templates and weights, against the others."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte as hb
import real_models
from halfbyte.formats.bitsandbytes_layout import from_bitsandbytes, quantized_names
from halfbyte.formats.gguf_file import GgufFile
from halfbyte.formats.shards import open_shards
from halfbyte.models.gguf_model import GgufModel
from halfbyte.models.gguf_tokenizer import tokenizer_files
from halfbyte.models.quantize_model import quantize_model
from halfbyte.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.real, pytest.mark.slow]

LLAMA_CPP = json.loads(Path(__file__).with_name("llama_cpp_ids.json").read_text())
TEXTS: list[str] = LLAMA_CPP["texts"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "smollm2-nf4"
    return quantize_model(real_models.smollm2_gguf(), out).path


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_ids_equal_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    for file, content in tokenizer_files(
        GgufFile.open(getattr(real_models, f"{name}_gguf")())
    ).items():
        (tmp_path / file).write_text(content)
    tokenizer = Tokenizer.load(tmp_path)
    for text, expected in zip(TEXTS, LLAMA_CPP["ids"][name], strict=True):
        if name == "gemma3" and "</s>" in text:
            # A tag of HTML in Gemma's vocabulary. llama.cpp takes the name for an end of text,
            # and so for a control token, whatever the file says.
            continue
        ids = tokenizer.encode(text, bos=False)
        assert ids == expected, text
        spaces = {"▁": " "} if name == "gemma3" else {}  # one token for both
        assert tokenizer.decode(ids) == text.translate(str.maketrans(spaces))


def conversations(count: int) -> list[list[dict[str, str]]]:
    rng = random.Random(5)  # noqa: S311
    texts = [text for text in TEXTS if text and "<|im_" not in text]
    made = []
    for _ in range(count):
        messages = [{"role": "system", "content": rng.choice(texts)}] if rng.random() < 0.4 else []
        for turn in range(rng.randint(1, 6)):
            role = "assistant" if turn % 2 else "user"
            content = " ".join(rng.sample(texts, rng.randint(1, 3)))
            messages.append({"role": role, "content": content})
        made.append(messages)
    return made


def test_fifty_conversations_equal_those_of_transformers(smollm2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2)
    ours = Tokenizer.load(smollm2)
    assert ours.eos_ids == (2,)
    num_learned = 0
    for messages in conversations(50):
        for prompt in (False, True):
            text = theirs.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False
            )
            assert ours.render_chat(messages, add_generation_prompt=prompt) == text
            expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt)
            assert (
                ours.encode_chat(messages, add_generation_prompt=prompt).ids
                == expected["input_ids"]
            )
        tokens = ours.encode_chat(messages)
        learned = [i for i, t in zip(tokens.ids, tokens.trained, strict=True) if t]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        # The line break before an answer shares a token with white space at its start.
        found = ours.decode(learned, skip_special=False).split("<|im_end|>")
        assert [f.strip() for f in found] == [a.strip() for a in answers] + [""]
        num_learned += len(answers)
    assert num_learned > 50


def test_weights_equal_those_of_the_transformers_converter() -> None:
    transformers = pytest.importorskip("transformers")
    path = real_models.smollm2_gguf()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).state_dict()
    ours = GgufModel(GgufFile.open(path))
    assert ours.names.keys() == theirs.keys() - {"lm_head.weight"}
    for name in ours.names:
        assert torch.equal(ours.read(name), theirs[name]), name


def test_transformers_and_bitsandbytes_give_our_logits(smollm2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    ids = Tokenizer.load(smollm2).encode("The capital of France is Paris, and the capital of Italy")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].float()
    exact = hb.load(smollm2, compute_dtype=torch.float32).logits(ids)
    ours = hb.load(smollm2).logits(ids).float()
    # Both compute in bfloat16 with the same 4-bit weights, and round at different places: each is
    # off from float32 by the noise of 30 layers, about equally.
    noise, difference = (ours - exact).norm(), (theirs - exact).norm()
    assert difference <= 2 * noise
    # Some 12 roundings of up to 2^-9 a layer, added in squares over 30 layers, make 2^-4.8 of the
    # logits; how PyTorch sums bfloat16 products differs between processors.
    assert difference <= 2**-4 * exact.norm()


def test_a_quantized_model_is_near_the_file(smollm2: Path) -> None:
    tensors = open_shards(smollm2)
    original = GgufModel(GgufFile.open(real_models.smollm2_gguf()))
    for name in sorted(quantized_names(tensors))[::20]:
        parts = {n: tensors.read(n) for n in tensors if n == name or n.startswith(f"{name}.")}
        quantized, weight = from_bitsandbytes(name, parts).dequantize(), original.read(name)
        assert (quantized - weight).float().norm() < 0.12 * weight.float().norm()

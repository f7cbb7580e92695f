"""Real models against transformers and bitsandbytes: text, and 4-bit directories both ways."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.generation.engine import Engine
from halfbyte.generation.sampling import Sampling
from halfbyte.layers.segments import pack
from halfbyte.models.load import load_decoder
from real_models import gemma3_gguf, smollm2_gguf, write_directory
from tiny_models import quantize_directory

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Water boils at",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are",
    "SELECT name FROM",
    "Die Hauptstadt von Deutschland ist",
    "Q: What is the tallest mountain on Earth?\nA:",
]
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(smollm2_gguf(), tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(gemma3_gguf(), tmp_path_factory.mktemp("gemma3"))


def oracle(directory: Path, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_greedy_text_equals_that_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(name)
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    decoder = load_decoder(directory, compute_dtype=torch.float32, resident=True)
    engine = Engine(decoder, prompts, max_new_tokens=NUM_TOKENS, sampling=Sampling())
    found: list[list[int]] = [[] for _ in prompts]
    while engine.running:
        for new in engine.step():
            found[new.sequence].append(new.token)
    theirs = oracle(directory, dtype=torch.float32)
    for prompt, tokens in zip(prompts, found, strict=True):
        # If each token is the likeliest after those before it, then they are the greedy text.
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert tokens == logits.argmax(dim=-1).tolist()


def require_equal_logits(directory: Path, theirs: Any) -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    decoder = load_decoder(directory, compute_dtype=torch.float32)
    modules = dict(theirs.named_modules())
    for path, linear in decoder.linears.items():
        weight = modules[path].weight
        ours = linear.store.acquire(linear.weight)
        assert isinstance(ours, QuantizedTensor)
        decoded = functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(ours.dequantize(dtype=decoded.dtype), decoded)
    tokens = torch.randint(0, 40_000, (200,), generator=torch.Generator().manual_seed(0))
    found = decoder.logits(tokens, pack([200]))
    with torch.no_grad():  # repacks its weights, so it comes after they were compared
        expected = theirs(tokens[None]).logits[0].float()
    # On CPUs with AVX512-BF16 bitsandbytes multiplies in bfloat16 whatever its compute dtype:
    # activations and weights are off by up to 2^-9 each. In 30 layers of 7 products, which the
    # residual stream averages, that stays within 2^-6.
    assert (found - expected).norm() < 2**-6 * expected.norm()


def test_transformers_with_bitsandbytes_loads_our_directory(smollm2: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    ours = Path(shutil.copytree(smollm2, tmp_path / "nf4"))
    quantize_directory(ours, compute_dtype=torch.float32)
    require_equal_logits(ours, oracle(ours, dtype=torch.float32, device_map="cpu"))


def test_a_directory_saved_by_transformers_with_bitsandbytes_loads(
    smollm2: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    config: Any = pytest.importorskip("transformers").BitsAndBytesConfig
    theirs = oracle(
        smollm2,
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=config(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    theirs.save_pretrained(tmp_path)
    require_equal_logits(tmp_path, theirs)

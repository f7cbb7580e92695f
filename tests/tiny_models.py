"""Tiny random models of every family, made by transformers, which is their oracle."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.formats.bitsandbytes_layout import quantization_config, to_bitsandbytes
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.layers.weights import ResidentStore
from halfbyte.models.config import parse_config
from halfbyte.models.decoder import Decoder

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
"""Heads times head_dim is not the hidden size, and nothing is a power of two that need not be."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases-tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}},
    ),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral-whole": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 6, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    ),
    "gemma3-pattern-softcap": (
        "gemma3_text",
        {"sliding_window": 9, "sliding_window_pattern": 2, "final_logit_softcapping": 3.0},
    ),
}


def make_oracle(case: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """A transformers model with every parameter random, norms and biases included."""
    transformers = pytest.importorskip("transformers")
    family, changes = CASES[case]
    settings = SIZES | changes | sizes
    if family == "qwen2":  # its head_dim follows from the other sizes
        settings = {k: v for k, v in settings.items() if k != "head_dim"}
    config = transformers.AutoConfig.for_model(family, **settings)
    with deterministic(hash_of(case)):
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            scale = 0.3 if "norm" in name or "bias" in name else 0.15
            offset = 1.0 if "norm" in name and family != "gemma3_text" else 0.0
            torch.nn.init.normal_(parameter, offset, scale)
    return model.to(dtype).eval()


def hash_of(case: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(case)) % 2**31


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Seeded, and the global generator is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def weights_of(oracle: Any) -> dict[str, Tensor]:
    """Its tensors by the names they have on disk."""
    state = {name: tensor.detach().clone() for name, tensor in oracle.state_dict().items()}
    if oracle.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def make_decoder(oracle: Any, dtype: torch.dtype = torch.float32) -> Decoder:
    """Ours, with the oracle's weights."""
    config = parse_config(oracle.config.to_dict())
    return Decoder(config, ResidentStore(weights_of(oracle)), compute_dtype=dtype)


def random_tokens(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZES["vocab_size"], (count,), generator=generator)


def save_directory(oracle: Any, directory: Path, *, four_bit: bool = False) -> Path:
    """A model directory as transformers writes it, its linears in NF4 on request."""
    oracle.save_pretrained(directory)
    if four_bit:
        quantize_directory(directory)
    return directory


def quantize_directory(directory: Path, compute_dtype: torch.dtype = torch.bfloat16) -> None:
    """Put the linears of an unsharded directory into NF4, in place."""
    path = directory / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    file = SafetensorsFile.open(path)
    for name in file.entries:
        tensor = file.read(name)
        parts = to_bitsandbytes(name, hb.quantize(tensor)) if "_proj.weight" in name else None
        tensors |= parts or {name: tensor}
    write_safetensors(path, tensors, {"format": "pt"})
    config = quantization_config(
        "nf4", block_size=64, double_quant=True, compute_dtype=compute_dtype
    )
    change_config(directory, quantization_config=config)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

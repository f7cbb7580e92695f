"""A tiny model directory, a tiny data file, and configs that train one on the other."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.formats.bitsandbytes_layout import quantization_config, to_bitsandbytes
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.models.config import parse_config
from halfbyte.models.layout import layout_of
from halfbyte.training.config import Config
from halfbyte.training.config_file import load_config
from tiny_tokenizers import write_model

SETTINGS: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def make_model(directory: Path, *, four_bit: bool = True, **changes: Any) -> Path:
    """A random Llama with a byte-level tokenizer, as `halfbyte quantize` would leave it.

    Args:
        directory: For the model.
        four_bit: Whether its projections are in NF4.
        changes: To `SETTINGS`.
    """
    settings = SETTINGS | changes
    write_model(directory, "byte-level")
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for ref in layout_of(parse_config(settings)).refs():
        if len(ref.shape) == 1:
            tensors[ref.name] = torch.ones(ref.shape, dtype=torch.bfloat16)
            continue
        weight = (0.2 * torch.randn(ref.shape, generator=generator)).bfloat16()
        if four_bit and "_proj" in ref.name:
            tensors |= to_bitsandbytes(ref.name, hb.quantize(weight))
        else:
            tensors[ref.name] = weight
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    config = dict(settings)
    if four_bit:
        quantization = quantization_config("nf4", block_size=64, double_quant=True)
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def make_data(path: Path, num_rows: int = 60) -> Path:
    """Prompts with one right answer each."""
    animals, places = ["cat", "dog", "hen", "pig", "cow"], ["mat", "bed", "roof", "lawn"]
    rows = [
        {
            "prompt": f"number {i} : the {animals[i % 5]} sat on the",
            "completion": f" {places[i % 4]} " + "again " * (i % 7),
        }
        for i in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(directory: Path, *assignments: str, **flags: Any) -> Config:
    """A run of a few seconds at most in `directory / "run"`."""
    method = next((a for a in assignments if a.startswith("training.method=")), "qlora")
    model = directory / ("model-4bit" if method.endswith("qlora") else "model-16bit")
    if not model.exists():
        make_model(model, four_bit=method.endswith("qlora"))
    data = directory / "data.jsonl"
    if not data.exists():
        make_data(data)
    defaults = {
        "model": str(model),
        "data.train": str(data),
        "data.eval_fraction": 0.2,
        "output.dir": str(directory / "run"),
        "lora.rank": 4,
        "training.tokens_per_step": 256,
        "training.micro_batch_tokens": 128,
        "training.learning_rate": 1e-2,
        "training.compute_dtype": "fp32",
    }
    written = [f"{name}={json.dumps(value)}" for name, value in (defaults | flags).items()]
    return load_config(None, [*written, *assignments])

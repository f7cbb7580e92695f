"""Memory that merging takes above the idle interpreter, for a random model of TinyLlama's widths.

    python benchmarks/merge_memory.py [LAYERS] [DTYPE ...]

With 22 layers (1.1B parameters) unless told otherwise, in bf16 and nf4. Prints a line a dtype.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import halfbyte as hb
from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.peft_files import write_adapter
from halfbyte.formats.bitsandbytes_layout import quantization_config, to_bitsandbytes
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.models.config import parse_config
from halfbyte.models.layout import layout_of

CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
RANK = 16

MEASURE = """
import json, sys, time
import torch, halfbyte.kernels
from halfbyte.memory.resident import resident
idle = resident().total
import halfbyte as hb
base, adapter, out, dtype = sys.argv[1:]
start = time.monotonic()
hb.merge(base, adapter, out=out, dtype=dtype, accept=True)
print(json.dumps({"seconds": time.monotonic() - start, "above": resident().peak - idle}))
"""


@dataclass(frozen=True, slots=True)
class Taken:
    """By one merge.

    Attributes:
        seconds: Time.
        above: Bytes of its peak above the idle interpreter.
    """

    seconds: float
    above: int


def main() -> None:
    """Write a base and an adapter, and merge them in a process of their own."""
    num_layers = int(sys.argv[1]) if len(sys.argv) > 1 else 22
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_inputs(root, CONFIG | {"num_hidden_layers": num_layers})
        for dtype in sys.argv[2:] or ("bf16", "nf4"):
            taken = measure(root, dtype)
            print(
                f"{num_layers} layers, {dtype}: {taken.above / 2**20:.0f} MiB above the idle "
                f"interpreter, {taken.seconds:.0f} s",
                flush=True,
            )


def measure(root: Path, dtype: str) -> Taken:
    """Merge what `write_inputs` wrote."""
    paths = [str(root / part) for part in ("base", "adapter", f"out-{dtype}")]
    command = [sys.executable, "-c", MEASURE, *paths, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return Taken(**json.loads(done.stdout))


def write_inputs(root: Path, config: Mapping[str, object]) -> None:
    """`base` in NF4 and an `adapter` for all its linear layers; layers differ in nothing."""
    base = root / "base"
    base.mkdir()
    quantization = quantization_config("nf4", block_size=64, double_quant=True)
    content = {**config, "quantization_config": quantization}
    (base / "config.json").write_text(json.dumps(content))
    write_tokenizer(base)
    layout = layout_of(parse_config(config))
    linears = {f"{path}.weight" for path in layout.linear_paths()}
    generator = torch.Generator().manual_seed(0)
    made: dict[tuple[int, ...], torch.Tensor | hb.QuantizedTensor] = {}
    tensors = {}
    for ref in layout.refs():
        if ref.shape not in made:
            noise = torch.randn(ref.shape, generator=generator) * 0.02
            kept = noise.bfloat16() if ref.shape[1:] else torch.ones(ref.shape).bfloat16()
            made[ref.shape] = hb.quantize(noise) if ref.name in linears else kept
        value = made[ref.shape]
        if isinstance(value, hb.QuantizedTensor):
            tensors |= to_bitsandbytes(ref.name, value.to(dtype=torch.bfloat16))
        else:
            tensors[ref.name] = value
    write_safetensors(base / "model.safetensors", tensors, {"format": "pt"})
    modules = {
        linear.path: LoraUpdate(
            torch.randn(RANK, linear.weight.shape[1], generator=generator) * 0.02,
            torch.randn(linear.weight.shape[0], RANK, generator=generator) * 0.02,
            float(RANK),
        )
        for layer in layout.layers
        for linear in layer.linears
    }
    write_adapter(Adapter(modules, str(base)), root / "adapter")


def write_tokenizer(directory: Path) -> None:
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "</s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


if __name__ == "__main__":
    main()

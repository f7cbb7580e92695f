from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_tokenizers import write_model

Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """`build(kind, template, config, **files)` writes a model directory and gives its path."""

    def write(*args: object, **kwargs: object) -> Path:
        directory = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        return write_model(directory, *args, **kwargs)  # type: ignore[arg-type]

    return write

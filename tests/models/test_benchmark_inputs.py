"""Models for benchmarks: what is made opens, and is there whole or not at all."""

from pathlib import Path

import pytest
import torch
from benchmarks import inputs
from benchmarks.merge_memory import CONFIG

import halfbyte as hb

SMALL = CONFIG | {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


def test_a_random_model_opens_in_16_and_in_4_bits(tmp_path: Path) -> None:
    inputs.write_random(tmp_path / "bf16", SMALL)
    hb.quantize_model(tmp_path / "bf16", tmp_path / "nf4")
    for name in ("bf16", "nf4"):
        logits = hb.load(tmp_path / name, compute_dtype=torch.float32).logits([1, 2, 3])
        assert logits.shape == (3, 300)
        assert logits.isfinite().all()


def test_a_model_is_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def write(directory: Path) -> None:
        made.append(directory)
        directory.mkdir()
        (directory / "part").touch()
        if len(made) == 1:
            raise KeyboardInterrupt
        (directory / "rest").touch()

    monkeypatch.setitem(inputs.MODELS, "tinyllama-bf16", write)
    with pytest.raises(KeyboardInterrupt):
        inputs.make("tinyllama-bf16", tmp_path)
    assert not (tmp_path / "tinyllama-bf16").exists()
    for _ in range(2):
        directory = inputs.make("tinyllama-bf16", tmp_path)
    assert sorted(path.name for path in directory.iterdir()) == ["part", "rest"]
    assert len(made) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["tinyllama-bf16"]

"""`hb.train` and `hb.resume`."""

from pathlib import Path

import pytest

import halfbyte as hb
from halfbyte.errors import ConfigError, UsageError
from training.tiny_run import make_data, make_model


def test_a_run_from_python(tmp_path: Path) -> None:
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data.jsonl")
    config = tmp_path / "run.yaml"
    config.write_text("lora:\n  rank: 8\n  alpha: 8\n")
    result = hb.train(
        model=model,
        data={"train": str(data), "eval_fraction": 0.2},
        out=tmp_path / "run",
        config=config,
        lora={"rank": 2},
        training={"max_steps": 2, "tokens_per_step": 256},
    )
    assert result.outcome.step == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "rank: 2" in saved
    assert "alpha: 8" in saved
    assert hb.resume(tmp_path / "run").outcome.step == 2


def test_faults_are_those_of_the_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.rnk: did you mean lora\.rank"):
        hb.train(model="m", data="d", out=tmp_path / "run", lora={"rnk": 2})
    with pytest.raises(UsageError, match="lora: a mapping"):
        hb.train(model="m", data="d", out=tmp_path / "run", lora=3)  # type: ignore[arg-type]

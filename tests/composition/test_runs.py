"""Runs that also leave a standalone model."""

import json
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.cli import app
from halfbyte.errors import ConfigError
from halfbyte.models.quantize_model import quantize_model
from halfbyte.training.run import train as train_only
from training.tiny_run import make_config, make_data, make_model

SETTINGS = {
    "data.eval_fraction": 0.2,
    "lora.rank": 4,
    "training.max_steps": 3,
    "training.tokens_per_step": 256,
    "training.compute_dtype": "fp32",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    source = make_model(tmp_path / "16bit", four_bit=False)
    quantize_model(source, tmp_path / "base")
    make_data(tmp_path / "data.jsonl")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
def test_the_merged_model_is_base_and_adapter(base: Path, tmp_path: Path, dtype: str) -> None:
    run = hb.train(
        model=base,
        data={"train": str(tmp_path / "data.jsonl"), "eval_fraction": 0.2},
        out=tmp_path / "run",
        lora={"rank": 4},
        training={
            "max_steps": 16,  # enough for a gain that a merge into 4 bits can keep half of
            "tokens_per_step": 256,
            "learning_rate": 1e-2,
            "compute_dtype": "fp32",
        },
        output={"merge": dtype},
    )
    assert run.merged == tmp_path / "run" / "merged"
    report = json.loads((run.merged / "merge_report.json").read_text())
    assert (str(tmp_path / "data.jsonl") in json.dumps(report)) == (dtype == "nf4")
    config = json.loads((run.merged / "config.json").read_text())
    if dtype == "nf4":
        assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
        return
    merged = hb.load(run.merged, compute_dtype=torch.float32)
    live = hb.load(base, adapters=[run.result], compute_dtype=torch.float32)
    ids = list(range(20, 40))
    expected = live.logits(ids)
    # Each weight is rounded to bfloat16, 2^-9 of it at most, in two layers.
    assert (merged.logits(ids) - expected).norm() < 0.02 * expected.norm()


def test_texts_of_the_merge_are_read_as_the_run_read_them(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    both = [row | {"text": f"{row['prompt']}{row['completion']}"} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in both))
    options = [f"{name}={value}" for name, value in SETTINGS.items()]
    run = tmp_path / "run"
    arguments = ["--model", str(base), "--data", str(data), "--out", str(run)]
    chosen = ["data.format=text", "output.merge=nf4"]
    # Three steps leave an adapter that a merge may lose and be refused for, but never misread.
    assert app.run(["train", *options, *chosen, *arguments]) in {0, 3}
    merging = ["merge", str(base), str(run / "adapter"), "--dtype", "nf4", "--accept"]
    merging += ["--calibration", str(data), "--out", str(tmp_path / "merged")]
    capsys.readouterr()
    assert app.run(merging) == 1
    assert "set data.format to the one that is meant" in capsys.readouterr().err
    assert app.run([*merging, "--data-format", "alpacca"]) == 2
    assert "data.format: one of auto, messages," in capsys.readouterr().err
    assert app.run([*merging, "--data-format", "prompt_completion"]) == 0


def test_the_command_line_merges_and_says_where(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"{name}={value}" for name, value in SETTINGS.items()]
    run = tmp_path / "run"
    arguments = ["--model", str(base), "--data", str(tmp_path / "data.jsonl"), "--out", str(run)]
    assert app.run(["train", *options, "output.merge=bf16", *arguments]) == 0
    assert f"merged: {run / 'merged'}" in capsys.readouterr().out
    assert app.run(["resume", str(run)]) == 0
    assert f"merged: {run / 'merged'}" in capsys.readouterr().out


def test_what_cannot_be_merged_is_refused_before_any_compute(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="full leaves a model"):
        train_only(make_config(tmp_path, "training.method=full", "output.merge=bf16"))
    with pytest.raises(ConfigError, match="base with another one"):
        train_only(make_config(tmp_path, "lora.on_top_of=below", "output.merge=nf4"))
    with pytest.raises(ConfigError, match=r"output\.merge.*'int4'"):
        make_config(tmp_path, "output.merge=int4")
    assert not (tmp_path / "run").exists()

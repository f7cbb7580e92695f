"""`halfbyte train` and `halfbyte resume`."""

import json
import os
import signal
from pathlib import Path

import pytest

from halfbyte.cli import app
from halfbyte.cli.run_config import read_run_config
from halfbyte.cli.run_view import RunView
from training.tiny_run import make_data, make_model

SMALL = ("lora.rank=2", "training.tokens_per_step=256", "data.eval_fraction=0.2")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data.jsonl")
    out = tmp_path / "run"
    return ["train", *SMALL, "--model", str(model), "--data", str(data), "--out", str(out)]


def test_every_setting_is_listed_as_the_document_has_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert app.run(["train", "--settings"]) == 0
    listed = capsys.readouterr().out
    document = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    assert document.split("```text\n")[1].removesuffix("```\n") == listed, (
        "docs/settings.md is not what `halfbyte train --settings` prints"
    )
    assert "lora.rank = 16\n    Rank of the update, R.\n" in listed
    assert "data.train (needed)\n" in listed
    assert "optimizer.betas = [0.9, 0.999]\n" in listed
    assert app.run(["train", "--settings", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(record["meaning"] for record in records)
    (scheduler,) = [record for record in records if record["name"] == "training.scheduler"]
    assert scheduler["default"] == "cosine"
    assert scheduler["choices"] == ["constant", "linear", "cosine"]


def test_the_config_in_the_document_is_one(tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    file = tmp_path / "run.yaml"
    file.write_text(document.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    config = read_run_config([str(file), "lora.rank=8"], {})
    assert (config.lora.rank, config.data.max_length) == (8, 1024)
    assert config.training.learning_rate == 1e-4


def test_a_run_from_options(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run([*arguments, "training.max_steps=2"]) == 0
    out, err = capsys.readouterr()
    assert f"result: {tmp_path / 'run' / 'adapter'}" in out
    assert "held-out loss" in out
    assert "steps 1 to 2" in err
    assert "step 2/2  loss" in err


def test_a_run_from_a_config_with_json(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("lora:\n  rank: 2\ntraining:\n  max_steps: 2\n")
    assert app.run(["train", str(config), *arguments[1:], "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "started"
    assert kinds.count("step") == 2
    assert kinds[-1] == "finished"
    assert events[-1]["ending"] == "complete"


def test_a_paged_run_says_what_was_paged(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    paged = ("optimizer.name=paged_adamw_8bit", "optimizer.fast_bytes=8MiB")
    # The budget gives way altogether to the first micro-batch, and grows back for the second.
    assert app.run([*arguments, "training.max_steps=2", *paged, "--json"]) == 0
    out = capsys.readouterr()
    finished = json.loads(out.out.splitlines()[-1])
    assert finished["paging"]["fast_bytes"] == 8 * 2**20
    assert finished["paging"]["misses"] >= 0
    assert "of state and gradients in at most" in out.err


def test_stopping_exits_with_75_and_resuming_finishes(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunView, "stepped", stop)
        assert app.run([*arguments, "training.max_steps=4"]) == 75
    assert f"halfbyte resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert app.run(["resume", str(tmp_path / "run")]) == 0
    assert "finished after step 4" in capsys.readouterr().out


def test_faults_are_usage_errors(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run([*arguments, "lora.rnak=3"]) == 2
    assert "did you mean lora.rank?" in capsys.readouterr().err
    assert app.run(["train", str(tmp_path / "absent.yaml")]) == 1
    assert app.run(["resume", str(tmp_path)]) == 1
    assert not (tmp_path / "run").exists()

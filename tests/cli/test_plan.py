"""`halfbyte plan`, and a run that keeps what was predicted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.cli import app
from halfbyte.training import run_memory
from real_models import smollm2_gguf
from training.fake_probe import FakeProbe
from training.tiny_run import make_data, make_model

SMALL = ("lora.rank=2", "training.tokens_per_step=256", "data.eval_fraction=0.2")


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(run_memory, "run_probe", FakeProbe())
    monkeypatch.chdir(tmp_path)
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data.jsonl")
    return ["plan", *SMALL, "--model", str(model), "--data", str(data)]


def test_a_plan_is_shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(arguments) == 0
    out = capsys.readouterr().out
    assert "interpreter, libraries, data" in out
    assert "largest micro-batch  about" in out
    assert "recomputed           0 of 2 layers" in out
    assert not Path("run").exists()


def test_a_plan_as_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([*arguments, "--json", "memory.budget=100GB"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True
    assert plan["peak_bytes"] == sum(plan["parts"].values())
    assert plan["disk"]["total"] > 0


def test_what_does_not_fit_exits_with_4(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run([*arguments, "memory.budget=1MB"]) == 4
    out, err = capsys.readouterr()
    assert "does not fit 976.6 KiB (memory.budget)" in out
    assert "the limit is 1 MB (memory.budget)" in err
    assert app.run(["train", *arguments[1:], "--out", "run", "memory.budget=1MB"]) == 4


# A process inherits the peak of the one that starts it; pytest's would hide the run's.
LAUNCHER = """
import os, subprocess, sys
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:], stdout=2).pid, 0)
print(status, usage.ru_maxrss * 1024)
"""


def measured_and_predicted(out: Path, arguments: list[str]) -> tuple[int, int]:
    """Peak resident memory of a whole run, as the kernel tells its parent, and as planned."""
    run = [sys.executable, "-m", "halfbyte", "train", "--out", str(out), *arguments]
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *run],
        env={**os.environ, "PYTHONPATH": source},
        stdout=subprocess.PIPE,
        check=True,
    )
    status, measured = map(int, done.stdout.split())
    assert status == 0
    return measured, json.loads((out / "plan.json").read_text())["peak_bytes"]


def test_a_tiny_run_takes_what_was_predicted(tmp_path: Path) -> None:
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data.jsonl")
    arguments = ["--model", str(model), "--data", str(data), *SMALL, "training.max_steps=3"]
    measured, predicted = measured_and_predicted(
        tmp_path / "run", [*arguments, "memory.budget=4GB", "training.compute_dtype=fp32"]
    )
    assert measured <= predicted <= measured + max(0.05 * measured, 30e6)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("smollm2") / "model"
    assert app.run(["quantize", str(smollm2_gguf()), str(model)]) == 0
    return model


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    "budget", [pytest.param("4GB", id="all-kept"), pytest.param("800MB", id="some-recomputed")]
)
def test_a_real_run_takes_what_was_predicted(smollm2: Path, tmp_path: Path, budget: str) -> None:
    data = make_data(tmp_path / "data.jsonl")
    settings = [
        # Two steps: the first takes less, there is no optimizer state yet. More tokens than the
        # probe takes.
        "training.max_steps=2", "training.tokens_per_step=450", "training.compute_dtype=fp32",
        f"memory.budget={budget}", "memory.recompute=auto",
    ]  # fmt: skip
    arguments = ["--model", str(smollm2), "--data", str(data), *settings]
    measured, predicted = measured_and_predicted(tmp_path / "run", arguments)
    assert measured <= predicted <= measured + max(0.05 * measured, 30e6)
    recompute = json.loads((tmp_path / "run" / "plan.json").read_text())["recompute"]
    assert (recompute > 0) == (budget == "800MB")

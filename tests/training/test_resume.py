"""A run that was killed, however often and wherever, ends as if it had not been."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.errors import DataError, MissingFileError, StorageError
from halfbyte.storage.lock import lock_directory
from halfbyte.training.checkpoint import list_checkpoints
from halfbyte.training.config import Config
from halfbyte.training.metrics import MEASURED_FIELDS, read_records
from halfbyte.training.progress import Silent
from halfbyte.training.run import resume, train
from halfbyte.training.trainer import Ending
from training.tiny_run import make_config, make_data

LONG = (
    "training.num_epochs=3",
    "training.save_steps=2",
    "training.eval_steps=5",
    "training.tokens_per_step=200",
    "lora.dropout=0.2",
)


def results(directory: Path) -> tuple[bytes, list[bytes], list[dict[str, object]]]:
    """What must be the same: adapter, last checkpoint, and all records but for what is measured."""
    adapter = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
    last = list_checkpoints(directory)[-1]
    records = [
        {key: value for key, value in record.items() if key not in MEASURED_FIELDS}
        for record in read_records(directory / "metrics.jsonl")
    ]
    return adapter, [path.read_bytes() for path in sorted(last.iterdir())], records


class StopAt(Silent):
    """Sends this process a SIGTERM once a step is recorded."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.notes: list[str] = []

    def stepped(self, record: object) -> None:
        assert isinstance(record, dict)
        if record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def noted(self, text: str) -> None:
        self.notes.append(text)


def train_at(tmp_path: Path, name: str, *assignments: str) -> Config:
    return make_config(tmp_path, *assignments, **{"output.dir": str(tmp_path / name)})


@pytest.mark.parametrize("step", [1, 6, 11])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_stopping_and_resuming_changes_no_bit(tmp_path: Path, step: int, name: str) -> None:
    train(train_at(tmp_path, "whole", *LONG, f"optimizer.name={name}"))
    stopped = train(train_at(tmp_path, "parts", *LONG, f"optimizer.name={name}"), StopAt(step))
    assert stopped.outcome.ending is Ending.STOPPED
    assert stopped.outcome.step == step
    assert stopped.result is None
    resumed = resume(tmp_path / "parts")
    assert resumed.outcome.ending is Ending.COMPLETE
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_a_paged_optimizer_changes_no_bit_across_a_stop(tmp_path: Path) -> None:
    train(train_at(tmp_path, "whole", *LONG))
    paged = (*LONG, "optimizer.name=paged_adamw", "optimizer.fast_bytes=16MB")
    train(train_at(tmp_path, "parts", *paged), StopAt(4))
    resume(tmp_path / "parts")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_every_step_is_recorded_once(tmp_path: Path) -> None:
    train(train_at(tmp_path, "run", *LONG), StopAt(3))
    resume(tmp_path / "run", StopAt(7))
    resume(tmp_path / "run")
    records = list(read_records(tmp_path / "run" / "metrics.jsonl"))
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, len(steps) + 1))
    evaluations = [record["step"] for record in records if "eval_loss" in record]
    assert evaluations == sorted(set(evaluations))


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path) -> None:
    train(train_at(tmp_path, "whole", *LONG))
    train(train_at(tmp_path, "run", *LONG), StopAt(5))
    newest = list_checkpoints(tmp_path / "run")[-1]
    with (newest / "trained.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"x")
    observer = StopAt(-1)
    resume(tmp_path / "run", observer)
    assert any("passed over" in note and newest.name in note for note in observer.notes)
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_a_finished_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    train(train_at(tmp_path, "run", *LONG))
    before = results(tmp_path / "run")
    assert resume(tmp_path / "run").outcome.ending is Ending.COMPLETE
    assert results(tmp_path / "run") == before


def test_faults_are_named_before_any_compute(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no run is here"):
        resume(tmp_path)
    train(train_at(tmp_path, "run", *LONG), StopAt(2))
    with pytest.raises(StorageError, match="holds a run already"):
        train(train_at(tmp_path, "run", *LONG))
    with lock_directory(tmp_path / "run"), pytest.raises(StorageError, match="in use"):
        resume(tmp_path / "run")
    make_data(tmp_path / "data.jsonl", num_rows=61)
    with pytest.raises(DataError, match="data"):
        resume(tmp_path / "run")


@pytest.mark.slow
def test_forty_kills_change_no_bit(tmp_path: Path) -> None:
    arguments = (*LONG, "training.save_steps=3")
    train(train_at(tmp_path, "whole", *arguments))
    script = Path(__file__).with_name("killed_runs.py")
    tests = str(Path(__file__).parents[1])
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "40", "0", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((source, tests))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] >= 40
    for run in report["runs"]:
        assert results(Path(run)) == results(tmp_path / "whole"), run

"""TensorBoard and Weights & Biases are told of a run, and cannot stop it."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halfbyte.errors import ConfigError
from halfbyte.training.metrics import read_records
from halfbyte.training.progress import Silent
from halfbyte.training.reports import Reports
from halfbyte.training.run import resume, train
from training.test_resume import StopAt
from training.tiny_run import make_config

SHORT = (
    "training.max_steps=4",
    "training.eval_steps=2",
    "training.save_steps=2",
    "training.num_samples=2",
    "training.sample_tokens=3",
)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def noted(self, text: str) -> None:
        self.notes.append(text)


class FakeWandb(SimpleNamespace):
    """A wandb that keeps what it is told, and raises in the method that is named."""

    def __init__(self, fails_in: str = "") -> None:
        super().__init__()
        self.fails_in = fails_in
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.calls: list[str] = []

    def _enter(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_in:
            raise RuntimeError(f"no {name} today\nand a second line")

    def init(self, **settings: Any) -> "FakeWandb":
        self._enter("init")
        self.settings = settings
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self._enter("log")
        self.logged.append((step, values))

    def Table(self, columns: list[str], data: list[list[str]]) -> Any:  # noqa: N802
        self._enter("Table")
        return columns, data

    def finish(self) -> None:
        self._enter("finish")


@pytest.fixture
def no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def run_with(
    wandb: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *assignments: str
) -> list[str]:
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    observer = Notes()
    train(make_config(tmp_path, *SHORT, "output.report_to=[wandb]", *assignments), observer)
    return [note for note in observer.notes if note.startswith("wandb ")]


def test_wandb_gets_every_record_and_stays_offline(
    no_mode: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    assert run_with(wandb, tmp_path, monkeypatch) == []
    assert wandb.settings["mode"] == "offline"
    assert wandb.settings["project"] == "halfbyte"
    assert wandb.settings["dir"] == str(tmp_path / "run")
    assert wandb.settings["config"]["lora"]["rank"] == 4
    records = list(read_records(tmp_path / "run" / "metrics.jsonl"))
    losses = {r["step"]: r["loss"] for r in records if "loss" in r}
    assert {step: v["train/loss"] for step, v in wandb.logged if "train/loss" in v} == losses
    held_out = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    assert {step: v["eval/loss"] for step, v in wandb.logged if "eval/loss" in v} == held_out
    tables = [v["samples"] for _, v in wandb.logged if "samples" in v]
    assert [len(rows) for _, rows in tables] == [2, 2]
    assert wandb.calls[-1] == "finish"


def test_wandb_goes_where_its_variables_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    wandb = FakeWandb()
    run_with(wandb, tmp_path, monkeypatch, "training.max_steps=1")
    assert (wandb.settings["mode"], wandb.settings["project"]) == ("online", "mine")


@pytest.mark.parametrize("place", ["init", "log", "Table", "finish"])
def test_a_writer_that_fails_is_one_notice(
    no_mode: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    wandb, observer = FakeWandb(place), Notes()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    reports = Reports(observer, make_config(tmp_path, "output.report_to=[wandb, wandb]"))
    reports.started({"first_step": 1})
    for step in (1, 2):
        reports.stepped({"step": step, "loss": 0.5})
        reports.evaluated({"step": step, "eval_loss": 0.5})
        reports.sampled([{"step": step, "prompt": "p", "reference": "r", "text": "t"}])
    reports.close()
    assert observer.notes == [
        f"wandb is not reported to any more (RuntimeError: no {place} today); the run goes on"
    ]
    assert wandb.calls.count(place) == 1


def test_a_package_that_is_absent_is_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (note,) = run_with(None, tmp_path, monkeypatch, "training.max_steps=1")
    assert "wandb is not reported to" in note
    assert (tmp_path / "run" / "adapter").is_dir()


def test_tensorboard_reads_what_was_written_over_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,
    )

    config = make_config(tmp_path, *SHORT, "output.report_to=[tensorboard]")
    train(config, StopAt(3))
    resume(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    records = list(read_records(tmp_path / "run" / "metrics.jsonl"))
    for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        written = [(event.step, event.value) for event in events.Scalars(tag)]
        expected = [(r["step"], pytest.approx(r[key])) for r in records if key in r]
        assert written == expected
    assert "samples/0/text_summary" in events.Tags()["tensors"]


def test_an_unknown_writer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"report_to.*'tensorboard' or 'wandb', found 'mlflow'"):
        make_config(tmp_path, "output.report_to=[mlflow]")

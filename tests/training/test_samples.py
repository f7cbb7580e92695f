"""Held-out prompts continued at evaluations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte as hb
from halfbyte.data.dataset import Dataset
from halfbyte.data.rows import Origin
from halfbyte.data.store import StoreBuilder
from halfbyte.errors import ConfigError
from halfbyte.training.config_file import write_config
from halfbyte.training.metrics import read_records
from halfbyte.training.progress import Record, Silent
from halfbyte.training.run import resume, train
from halfbyte.training.samples import choose_prompts
from training.test_resume import LONG, StopAt, results
from training.tiny_run import make_config

PLAIN = (
    *LONG,
    "training.num_epochs=1",
    "training.eval_steps=4",
    "training.eval_first=true",
    "training.compute_dtype=bf16",
)
SAMPLED = (*PLAIN, "training.num_samples=3", "training.sample_tokens=9")


class Sampled(Silent):
    def __init__(self) -> None:
        self.records: list[Record] = []

    def sampled(self, records: Sequence[Record]) -> None:
        self.records += records


@pytest.fixture(scope="module")
def whole(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sampled]:
    """A run with samples, and what its observer was told."""
    directory = tmp_path_factory.mktemp("whole")
    observer = Sampled()
    train(make_config(directory, *SAMPLED), observer)
    return directory / "run", observer


def texts(run: Path) -> list[dict[str, Any]]:
    return list(read_records(run / "samples.jsonl"))


def test_samples_are_what_the_model_says_afterwards(whole: tuple[Path, Sampled]) -> None:
    run, observer = whole
    found = texts(run)
    assert found == observer.records
    steps = [record["step"] for record in found]
    assert steps[0] == 0
    assert steps == sorted(steps)
    last = [record for record in found if record["step"] == steps[-1]]
    assert len(last) == len({record["prompt"] for record in last}) == 3
    assert all(record["row"].startswith("data.jsonl:") for record in last)
    assert all(record["reference"].startswith(" ") for record in last)
    assert [r["text"] for r in last] != [r["text"] for r in found[:3]]
    model = hb.load(run.parent / "model-4bit", adapters=[run / "adapter"])
    prompts = [record["prompt"] for record in last]
    assert model.generate(prompts, max_new_tokens=9) == [record["text"] for record in last]


def test_sampling_changes_no_bit(whole: tuple[Path, Sampled], tmp_path: Path) -> None:
    train(make_config(tmp_path, *PLAIN))
    assert results(tmp_path / "run") == results(whole[0])
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_samples_are_written_once_over_resumes(whole: tuple[Path, Sampled], tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped = train(make_config(tmp_path, *SAMPLED), StopAtEvaluation(0))
    assert stopped.outcome.step == 0
    resume(run, StopAt(3))
    resume(run)
    assert results(run) == results(whole[0])
    assert texts(run) == texts(whole[0])


class StopAtEvaluation(StopAt):
    """Stops the run at its first evaluation, before its first step."""

    def evaluated(self, record: Record) -> None:
        self.stepped(dict(record))


def test_a_run_that_died_before_a_checkpoint_starts_afresh(
    whole: tuple[Path, Sampled], tmp_path: Path
) -> None:
    config = make_config(tmp_path, *SAMPLED, "training.max_steps=1")
    run = tmp_path / "run"
    run.mkdir()
    write_config(config, run / "config.yaml")
    lines = (whole[0] / "samples.jsonl").read_text().splitlines(keepends=True)
    (run / "samples.jsonl").write_text("".join(lines[:2]))
    resume(run)
    assert [record["step"] for record in texts(run)] == [0, 0, 0, 1, 1, 1]
    assert texts(run)[:3] == texts(whole[0])[:3]


def test_samples_need_held_out_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_samples = 2: held-out data expected"):
        train(make_config(tmp_path, "training.num_samples=2", "data.eval_fraction=0"))
    assert not (tmp_path / "run").exists()


def dataset(*documents: tuple[list[int], list[int], int]) -> Dataset:
    """Documents as (ids, trained or not, digest of the prompt)."""
    builder = StoreBuilder()
    for line, (ids, trained, digest) in enumerate(documents, 1):
        origin = Origin("a", line, "line")
        flags = [bool(flag) for flag in trained]
        builder.add(ids, flags, origin, row_digest=line, prompt_digest=digest)
    store = builder.build()
    return Dataset(store, torch.arange(len(documents)).numpy())


def test_prompts_end_where_the_answer_begins() -> None:
    held_out = dataset(
        ([1, 2, 3, 4], [0, 0, 1, 1], 1),
        ([1, 2, 8, 9], [0, 0, 1, 1], 1),  # another answer to the same prompt
        ([1, 3, 4, 5, 6], [0, 0, 1, 0, 1], 2),  # a second turn
        ([5, 6, 7, 8, 9], [1, 1, 1, 1, 1], 3),  # running text
        ([5, 6, 7, 8], [0, 0, 0, 1], 4),  # too long a prompt
        ([5, 6], [0, 1], 5),
    )
    found = choose_prompts(held_out, count=9, max_positions=3)
    assert [(s.row, s.prompt, s.reference) for s in found] == [
        ("a:1", (1, 2), (3, 4)),
        ("a:3", (1, 3), (4,)),
        ("a:4", (5, 6), (7, 8, 9)),
        ("a:6", (5,), (6,)),
    ]
    assert len(choose_prompts(held_out, count=2, max_positions=9)) == 2

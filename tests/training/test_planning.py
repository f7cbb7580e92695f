"""Plans, budgets, and what a run does with them."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import DoesNotFitError, HalfbyteError
from halfbyte.memory.available import available_memory
from halfbyte.memory.resident import reset_peak, resident
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.training import choosing, disk, probing, run_memory
from halfbyte.training.choices import Choices
from halfbyte.training.choosing import choose, plan_run
from halfbyte.training.config import Config
from halfbyte.training.methods import open_base
from halfbyte.training.plan import DiskNeed, planned_peak
from halfbyte.training.planning import Planner
from halfbyte.training.prediction import FIXED_ALLOWANCE, GROWING_ALLOWANCE
from halfbyte.training.probe_report import ProbeRequest
from halfbyte.training.progress import Silent
from halfbyte.training.run import resume, train
from halfbyte.training.run_data import open_run_data
from halfbyte.training.shapes import MicroBatchShape
from training.fake_probe import MB, FakeProbe
from training.test_resume import LONG, StopAt, results
from training.tiny_run import make_config

BIG = ("training.micro_batch_tokens=2000", "training.tokens_per_step=4000")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> FakeProbe:
    # The peak of whatever ran in this process before would be above every prediction.
    if not reset_peak():
        pytest.skip("the kernel does not let a process start its peak anew")
    fake = FakeProbe()
    monkeypatch.setattr(run_memory, "run_probe", fake)
    return fake


def planner(tmp_path: Path, *assignments: str) -> Planner:
    config = make_config(tmp_path, *assignments)
    data = open_run_data(config, Tokenizer.load(config.model))
    return Planner(config, open_base(config), data, config.training.micro_batch_tokens or 0)


def budget_for(tmp_path: Path, recompute: int) -> int:
    """A budget in which exactly that many recomputed layers fit."""
    return planner(tmp_path, *BIG).plan(recompute).peak_bytes + 10 * MB


def test_without_a_budget_nothing_is_measured(tmp_path: Path, probe: FakeProbe) -> None:
    seen: list[Any] = []

    class Starts(Silent):
        def started(self, summary: Any) -> None:
            seen.append(summary["planned_bytes"])

    train(make_config(tmp_path, "training.max_steps=1"), Starts())
    assert probe.requests == []
    assert seen == [None]
    assert not (tmp_path / "run" / "plan.json").exists()


def test_a_budget_is_kept_and_the_plan_recorded(tmp_path: Path, probe: FakeProbe) -> None:
    train(make_config(tmp_path, "training.max_steps=1", "memory.budget=100GB"))
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["fits"]
    assert plan["limit_bytes"] == 100 * 10**9
    assert plan["limit_from"] == "memory.budget"
    assert sum(plan["parts"].values()) == plan["peak_bytes"] == planned_peak(tmp_path / "run")
    assert plan["recompute"] == 0
    assert len(probe.requests) == 1


def test_auto_recomputes_the_fewest_layers_that_fit(tmp_path: Path, probe: FakeProbe) -> None:
    for expected in (0, 1):
        budget = budget_for(tmp_path, expected)
        config = make_config(tmp_path, *BIG, "memory.recompute=auto", f"memory.budget={budget}")
        plan, refusal = plan_run(config)
        assert refusal is None
        assert plan.recompute == expected
        assert plan.peak_bytes <= budget


def test_auto_without_a_budget_takes_the_memory_that_is_left(
    tmp_path: Path, probe: FakeProbe
) -> None:
    plan, _ = plan_run(make_config(tmp_path, "memory.recompute=auto"))
    assert plan.recompute == 0
    left = available_memory().bytes + resident().total
    assert plan.limit_bytes == pytest.approx(left, rel=0.2)  # others take and free some meanwhile


def test_the_nearest_configuration_is_named(tmp_path: Path, probe: FakeProbe) -> None:
    config = make_config(tmp_path, *BIG, f"memory.budget={budget_for(tmp_path, 1)}")
    _, refusal = plan_run(config)
    assert refusal is not None
    assert "gradients: 20 MB" in refusal.problems
    assert "memory.recompute=auto, which recomputes 1 layer" in refusal.hint

    tight = budget_for(tmp_path, 1) - 100 * MB
    _, refusal = plan_run(make_config(tmp_path, *BIG, f"memory.budget={tight}"))
    assert refusal is not None
    assert "memory.recompute=auto training.micro_batch_tokens=" in refusal.hint
    nearest = refusal.hint.partition("fits with ")[2].partition(";")[0].rstrip(".").split()
    plan, refusal = plan_run(make_config(tmp_path, *BIG, f"memory.budget={tight}", *nearest))
    assert refusal is None
    assert plan.fits


def test_a_run_that_cannot_fit_leaves_nothing(tmp_path: Path, probe: FakeProbe) -> None:
    with pytest.raises(DoesNotFitError, match="The least for documents of"):
        train(make_config(tmp_path, "memory.budget=1MB"))
    assert not (tmp_path / "run").exists()


def test_the_largest_settings_fit(tmp_path: Path, probe: FakeProbe) -> None:
    budget = budget_for(tmp_path, 0)
    plan, _ = plan_run(make_config(tmp_path, *BIG, f"memory.budget={budget}"))
    largest = plan.largest.micro_batch_tokens
    assert largest > plan.largest_micro_batch
    room = budget - (plan.peak_bytes - max(probe.step(plan.largest_micro_batch, 0).peaks))
    # 2 % of what is left stay free, and 1 % is added to every prediction.
    assert max(probe.step(largest, 0).peaks) == pytest.approx(room, rel=0.03)
    assert plan.largest.rank is not None
    assert plan.largest.rank > 4
    full = make_config(tmp_path, "training.method=full", f"memory.budget={budget}")
    assert plan_run(full)[0].largest.rank is None


def test_all_layers_and_small_batches_are_probed_as_they_are(
    tmp_path: Path, probe: FakeProbe
) -> None:
    plan, _ = plan_run(make_config(tmp_path, "memory.recompute=all"))
    (request,) = probe.requests
    assert request.recompute == (2,)
    assert request.shapes[-1].num_tokens == plan.largest_micro_batch
    assert request.accumulate


def test_an_evaluation_can_be_the_peak(tmp_path: Path, probe: FakeProbe) -> None:
    before = plan_run(make_config(tmp_path, *BIG))[0].peak_bytes
    probe.scoring = 10 * MB
    config = make_config(tmp_path, *BIG)
    held_out = open_run_data(config, Tokenizer.load(config.model)).held_out
    assert held_out is not None
    # All rows of logits of a vocabulary of 400 are there at once.
    taken = max(probe.evaluation(held_out.num_tokens, held_out.num_targets).peaks)
    expected = resident().total + taken * (1 + GROWING_ALLOWANCE) + FIXED_ALLOWANCE
    assert plan_run(config)[0].peak_bytes == pytest.approx(expected, rel=0.02)
    alone = plan_run(make_config(tmp_path, *BIG, "data.eval_fraction=0"))[0].peak_bytes
    assert alone == pytest.approx(before, rel=0.1)  # a little more is trained on then
    assert [request.evaluate for request in probe.requests] == [True, True, False]


def test_the_first_step_finds_no_optimizer_state(tmp_path: Path, probe: FakeProbe) -> None:
    probe.state = 15 * MB
    # Every step takes all of this data.
    one, two = (
        plan_run(make_config(tmp_path, *BIG, f"training.max_steps={count}"))[0].peak_bytes
        for count in (1, 2)
    )
    assert two - one == pytest.approx(probe.state, rel=0.1)
    paged = ("optimizer.name=paged_adamw", "optimizer.fast_bytes=16MB")
    one = plan_run(make_config(tmp_path, *BIG, "training.max_steps=1", *paged))[0].peak_bytes
    # Their gradients come one by one: a third, of all that the pool holds, by the end of the loss.
    assert two - one == pytest.approx(probe.state * 2 / 3, rel=0.1)


def test_time_follows_from_the_probe(tmp_path: Path, probe: FakeProbe) -> None:
    plan, _ = plan_run(make_config(tmp_path, "training.tokens_per_step=128"))
    mean = planner(tmp_path, "training.tokens_per_step=128").memory.workload
    per_step = 0.01 * mean.num_tokens / mean.total_micro_batches + 0.1
    assert plan.seconds_per_step == pytest.approx(per_step, rel=0.01)
    assert plan.seconds == pytest.approx(plan.num_steps * plan.seconds_per_step)


def test_a_resumed_run_keeps_its_choice(
    tmp_path: Path, probe: FakeProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = (*LONG, "memory.recompute=auto")
    planned = replace(plan_run(make_config(tmp_path, *LONG))[0], recompute=1)
    monkeypatch.setattr(choosing, "choose_plan", lambda config, planner: planned)

    def configure(name: str) -> Config:
        return make_config(tmp_path, *auto, **{"output.dir": str(tmp_path / name)})

    train(configure("whole"))
    train(configure("parts"), StopAt(4))
    monkeypatch.setattr(choosing, "choose_plan", None)
    monkeypatch.setattr(run_memory, "run_probe", None)
    resume(tmp_path / "parts")
    choices = Choices.read(tmp_path / "parts")
    assert choices is not None
    assert choices.recompute == 1
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_disk_is_checked_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, "optimizer.name=paged_adamw", "optimizer.fast_bytes=16MB")
    base = open_base(config)
    need = disk.disk_need(config, base)
    trained = disk.trained_elements(config, base)
    assert need.checkpoints == 3 * 12 * trained  # two that are kept, one in the making
    assert need.paged == 12 * trained
    monkeypatch.setattr(choosing, "disk_need", lambda *_: DiskNeed(10**9, 10**6, 0, 10**8))
    data = open_run_data(config, Tokenizer.load(config.model))
    with pytest.raises(DoesNotFitError, match=r"100 MB free, the run writes 1,001 MB"):
        choose(config, base, data)


def probe_request(tmp_path: Path) -> ProbeRequest:
    shapes = (MicroBatchShape((8,), 4), MicroBatchShape((16,), 8))
    return ProbeRequest(make_config(tmp_path), shapes, (0,), False, False, 1, tmp_path)


@pytest.mark.parametrize(
    ("stdout", "stderr", "code", "kind", "message"),
    [
        ("", "Traceback\nValueError: odd\n", 1, HalfbyteError, "ValueError: odd"),
        ("", "", -9, HalfbyteError, "exit code -9"),
        ('{"error": "no such model"}\n', "", 0, HalfbyteError, "no such model"),
        ('{"error": "x", "out_of_memory": true}\n', "", 0, DoesNotFitError, "of 16 tokens"),
    ],
)
def test_a_failing_probe_is_explained(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stdout: str,
    stderr: str,
    code: int,
    kind: type[HalfbyteError],
    message: str,
) -> None:
    done = subprocess.CompletedProcess([], code, stdout, stderr)
    monkeypatch.setattr(probing.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(kind, match=message):
        probing.run_probe(probe_request(tmp_path))

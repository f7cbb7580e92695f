"""Learning-rate schedules, against PyTorch's and transformers' where they agree in definition."""

import math

import pytest

from halfbyte.training.schedule import Schedule


def factors(kind: str, num_steps: int, warmup: int) -> list[float]:
    schedule = Schedule(kind, num_steps, warmup)
    return [schedule.factor(step) for step in range(num_steps)]


def test_warm_up_starts_above_zero_and_reaches_the_peak() -> None:
    assert factors("constant", 6, 4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_would_end_one_step_later() -> None:
    assert factors("linear", 4, 0) == [1.0, 0.75, 0.5, 0.25]


def test_cosine_is_half_way_at_half_time() -> None:
    values = factors("cosine", 100, 0)
    assert values[50] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_decay_is_that_of_transformers(kind: str) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = getattr(optimization, f"get_{kind}_schedule_with_warmup")
    theirs = make(optimizer, num_warmup_steps=0, num_training_steps=37).lr_lambdas[0]
    schedule = Schedule(kind, 37, 0)
    for step in range(37):
        assert math.isclose(schedule.factor(step), theirs(step), rel_tol=1e-12)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_run_that_is_all_warm_up(kind: str) -> None:
    assert factors(kind, 1, 1) == [1.0]


def test_the_ratio_rounds_up() -> None:
    assert Schedule.from_ratio("linear", 10, 0.01).num_warmup_steps == 1
    assert Schedule.from_ratio("linear", 10, 0.0).num_warmup_steps == 0

"""From measured steps to others."""

import random
from pathlib import Path

import pytest

from halfbyte.data.batch import evaluation_batches
from halfbyte.data.packing import PackingOptions
from halfbyte.data.steps import StepStream
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.training.prediction import (
    FIXED_ALLOWANCE,
    GROWING_ALLOWANCE,
    NOTHING,
    Absent,
    StepModel,
)
from halfbyte.training.probe_report import StepMemory
from halfbyte.training.run_data import open_run_data
from halfbyte.training.shapes import (
    BatchSize,
    MicroBatchShape,
    measure_evaluation,
    measure_workload,
)
from training.fake_probe import LOSS_ROWS, FakeProbe
from training.tiny_run import make_config


def size_of(num_tokens: int) -> BatchSize:
    return BatchSize(num_tokens, LOSS_ROWS)


def with_allowance(peak: float) -> float:
    return peak * (1 + GROWING_ALLOWANCE) + FIXED_ALLOWANCE


@pytest.mark.parametrize("tokens", [100, 500, 1500, 2000, 10_000])
def test_a_peak_that_moves_is_found(tokens: int) -> None:
    # The loss is the peak of small steps, the backward that of large ones: from 1667 tokens on.
    fake = FakeProbe()
    model = StepModel((fake.step(100, 0, 70), fake.step(300, 0, 200)))
    true = max(fake.step(tokens, 0).peaks)
    assert model.peak(size_of(tokens), 0) == pytest.approx(with_allowance(true), abs=1)
    assert model.kept(tokens, 0) == fake.step(tokens, 0).kept
    assert model.seconds(tokens, 0) == pytest.approx(fake.step(tokens, 0).seconds)


@pytest.mark.parametrize("layers", range(12))
def test_recomputed_layers_lie_on_a_line(layers: int) -> None:
    fake = FakeProbe(num_layers=12)
    few = (fake.step(100, 0), fake.step(300, 0))
    many = (fake.step(100, 11), fake.step(300, 11))
    true = max(fake.step(4000, layers).peaks)
    assert StepModel(few, many).peak(size_of(4000), layers) == pytest.approx(
        with_allowance(true), abs=2
    )


def peak_without(absent: Absent) -> int:
    step = StepMemory(10, 0, 1, (500, 700, 690, 650, 600), 500, 1.0)
    return StepModel((step,)).peak(BatchSize(10, 1), 0, absent)


def test_what_is_not_there_yet_is_taken_off_until_it_comes() -> None:
    # Of 100 bytes, 75 are missing at the second place, 50 at the third.
    assert peak_without(Absent(100, 100)) == round(with_allowance(690 - 50))
    assert peak_without(NOTHING) == round(with_allowance(700))
    # What fills a pool of 40 bytes is there soon: all of it at the third place.
    assert peak_without(Absent(40, 100)) == round(with_allowance(690))
    # What comes with the optimizer's step is missing up to the last place.
    assert peak_without(Absent(60, 0)) == round(with_allowance(640))
    assert peak_without(Absent(300, 0)) == round(with_allowance(600))


def test_steps_with_different_places_are_compared_as_wholes() -> None:
    small, large = StepMemory(10, 0, 1, (5, 9), 5, 1.0), StepMemory(20, 0, 1, (5, 10, 19), 5, 1.0)
    assert StepModel((small, large)).peak(BatchSize(30, 1), 0) == round(with_allowance(29))


def test_the_largest_step_fits_and_one_more_token_does_not() -> None:
    fake = FakeProbe()
    model = StepModel((fake.step(100, 0, 70), fake.step(300, 0, 200)))
    limit = 700_000_000
    largest = model.largest(limit, 0, size_of(10**6))
    assert model.peak(size_of(largest), 0) <= limit < model.peak(size_of(largest + 1), 0)
    assert model.largest(1, 0, size_of(10**6)) == 0
    assert model.largest(10**15, 0, size_of(512)) == 512


def test_resized_shapes_have_the_tokens_and_the_mix() -> None:
    rng = random.Random(0)  # noqa: S311  (made-up shapes)
    for _ in range(200):
        lengths = tuple(rng.randint(1, 200) for _ in range(rng.randint(1, 40)))
        shape = MicroBatchShape(lengths, rng.randint(1, sum(lengths)))
        tokens = rng.randint(2, 400)
        resized = shape.resized(tokens)
        assert resized.num_tokens == tokens
        assert min(resized.lengths) >= 1
        assert len(resized.lengths) == min(len(lengths), tokens // 2)
        assert 1 <= resized.num_targets <= tokens
    half = MicroBatchShape((100, 300), 200).resized(40)
    assert half == MicroBatchShape((10, 30), 20)
    assert MicroBatchShape((100, 300), 200).resized(40, 7).num_targets == 7


def not_exceeded(sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [
        size
        for size in sizes
        if not any(o != size and o[0] >= size[0] and o[1] >= size[1] for o in sizes)
    ]


def test_the_workload_is_that_of_the_stream(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    data = open_run_data(config, Tokenizer.load(config.model))
    options = PackingOptions(tokens_per_step=256, micro_batch_tokens=128, seed=3)
    stream = StepStream(data.train, options)
    steps = [next(stream) for _ in range(15)]  # three epochs and a part
    assert steps[-1].epoch > 0
    work = measure_workload(data.train, options, len(steps), vocabulary=400)
    batches = [batch for step in steps for batch in step.micro_batches]
    assert work.largest.num_tokens == max(batch.num_tokens for batch in batches)
    assert work.largest.num_targets in {batch.num_targets for batch in batches}
    # All logits of such a vocabulary are there at once.
    assert work.loss_rows == max(batch.num_targets for batch in batches)
    for (state, gradients), sizes in work.most.items():
        looked_at = [
            (batch.num_tokens, batch.num_targets)
            for number, step in enumerate(steps)
            for index, batch in enumerate(step.micro_batches)
            if (number > 0, index > 0) == (state, gradients)
        ]
        assert sizes == set(not_exceeded(looked_at))
    assert len(work.most) == 4
    assert work.accumulates
    assert work.total_micro_batches == len(batches)
    assert work.num_tokens == sum(step.num_tokens for step in steps)


def test_the_largest_evaluation_is_that_of_its_batches(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    held_out = open_run_data(config, Tokenizer.load(config.model)).held_out
    assert held_out is not None
    batches = list(evaluation_batches(held_out, 100))
    assert len(batches) > 1
    sizes = [(batch.num_tokens, batch.num_targets) for batch in batches]
    assert measure_evaluation(held_out, 100, vocabulary=400) == set(not_exceeded(sizes))

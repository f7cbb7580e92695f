"""Batches and the stream of steps: contents, invariance, and a position that resumes exactly."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.batch import Batch, build_batch, evaluation_batches
from halfbyte.data.dataset import Dataset
from halfbyte.data.packing import PackingOptions
from halfbyte.data.rows import Origin
from halfbyte.data.steps import Step, StepStream
from halfbyte.data.store import StoreBuilder
from halfbyte.errors import DataError, FormatError
from halfbyte.layers.segments import pack as pack_segments

OPTIONS = PackingOptions(tokens_per_step=20, micro_batch_tokens=12, seed=3)


def dataset_of(lengths: list[int], first_id: int = 0) -> Dataset:
    """Document d has tokens 100 d, 100 d + 1, ...; the first half of it is the prompt."""
    builder = StoreBuilder()
    for number, length in enumerate(lengths):
        ids = [first_id + 100 * number + place for place in range(length)]
        trained = [place >= length // 2 for place in range(length)]
        origin = Origin("a.jsonl", number + 1)
        builder.add(ids, trained, origin, row_digest=number, prompt_digest=number)
    return Dataset(builder.build(), np.arange(len(lengths), dtype=np.int64))


def same(left: Step, right: Step) -> bool:
    return (left.epoch, left.index, left.num_steps) == (
        right.epoch,
        right.index,
        right.num_steps,
    ) and all(
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.targets, b.targets)
        and a.segments.bounds_q == b.segments.bounds_q
        and torch.equal(a.segments.positions, b.segments.positions)
        and a.rows == b.rows
        for a, b in zip(left.micro_batches, right.micro_batches, strict=True)
    )


def test_a_batch_lays_documents_side_by_side() -> None:
    batch = build_batch(dataset_of([4, 3, 5]), [2, 0])
    assert batch.tokens.tolist() == [200, 201, 202, 203, 204, 0, 1, 2, 3]
    assert batch.targets.tolist() == [-100, 202, 203, 204, -100, -100, 2, 3, -100]
    assert batch.segments.bounds_q == (0, 5, 9)
    assert batch.segments.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch.rows == ("a.jsonl:3", "a.jsonl:1")
    assert (batch.num_tokens, batch.num_targets) == (9, 5)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64


def test_a_cut_text_predicts_across_the_cut() -> None:
    builder = StoreBuilder()
    origin = Origin("a.txt", 0, "token")
    builder.add_cut([10, 11, 12, 13], 2, origin, row_digest=0, prompt_digest=0)
    dataset = Dataset(builder.build(), np.arange(2, dtype=np.int64))
    batch = build_batch(dataset, [0, 1])
    assert batch.tokens.tolist() == [10, 11, 12, 13]
    assert batch.targets.tolist() == [11, 12, 13, -100]
    assert batch.segments.positions.tolist() == [0, 1, 0, 1]


def test_a_batch_of_wrong_shapes_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        Batch(
            torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), pack_segments([3]), ()
        )  # fmt: skip
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "tokens",
        "targets",
        "rows",
    ]


def test_evaluation_takes_every_document_in_order() -> None:
    dataset = dataset_of([4, 3, 5, 12, 1, 2])
    batches = list(evaluation_batches(dataset, 12))
    assert [batch.rows for batch in batches] == [
        ("a.jsonl:1", "a.jsonl:2", "a.jsonl:3"), ("a.jsonl:4",), ("a.jsonl:5", "a.jsonl:6"),
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"a\.jsonl:4: 12 tokens, more than .* = 11"):
        list(evaluation_batches(dataset, 11))
    assert list(evaluation_batches(dataset_of([]), 11)) == []


lengths_strategy = st.lists(st.integers(2, 12), min_size=1, max_size=25)


@given(lengths_strategy, st.integers(0, 3), st.booleans())
def test_an_epoch_shows_every_target_once(lengths: list[int], seed: int, group: bool) -> None:
    dataset = dataset_of(lengths)
    stream = StepStream(dataset, PackingOptions(20, 12, seed, group))
    steps = [next(stream) for _ in range(stream.num_steps(0))]
    rows = [row for step in steps for batch in step.micro_batches for row in batch.rows]
    assert sorted(rows) == sorted(f"a.jsonl:{number + 1}" for number in range(len(lengths)))
    assert sum(step.num_targets for step in steps) == dataset.num_targets
    assert sum(step.num_tokens for step in steps) == dataset.num_tokens
    assert all(step.num_tokens <= 20 for step in steps)
    assert all(batch.num_tokens <= 12 for step in steps for batch in step.micro_batches)
    following = next(stream)
    assert (following.epoch, following.index) == (1, 0)


@given(lengths_strategy, st.integers(0, 20), st.booleans())
def test_resuming_gives_exactly_the_steps_that_were_to_come(
    lengths: list[int], num_done: int, group: bool
) -> None:
    options = PackingOptions(20, 12, 5, group)
    whole = StepStream(dataset_of(lengths), options)
    for _ in range(num_done):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    resumed = StepStream.from_state(dataset_of(lengths), options, state)
    for _ in range(8):
        assert same(next(whole), next(resumed))
    assert whole.state() == resumed.state()


def test_planning_ahead_does_not_move_the_position() -> None:
    streams = [StepStream(dataset_of([5] * 9), OPTIONS) for _ in range(2)]
    assert streams[0].total_steps(3) == 9
    assert streams[0].num_steps(7) == 3
    assert same(next(streams[0]), next(streams[1]))


def test_micro_batches_do_not_change_what_a_step_holds() -> None:
    dataset = dataset_of([5, 7, 3, 9, 2, 4, 8, 6])
    small, large = (StepStream(dataset, PackingOptions(20, size)) for size in (9, 20))
    for _ in range(6):
        left, right = next(small), next(large)
        assert len(right.micro_batches) == 1
        rows = [sorted(r for b in step.micro_batches for r in b.rows) for step in (left, right)]
        assert rows[0] == rows[1]
        assert left.num_targets == right.num_targets


def test_other_data_or_options_are_refused_with_all_differences() -> None:
    state = StepStream(dataset_of([5, 6]), OPTIONS).state()
    with pytest.raises(DataError) as caught:
        StepStream.from_state(dataset_of([5, 6], first_id=1), PackingOptions(20, 11, 3), state)
    first, second = caught.value.problems
    assert first == "micro_batch_tokens: 12 when saved, 11 here"
    assert second.startswith("data: ")


@pytest.mark.parametrize(
    "change", [{"epoch": -1}, {"index": 1}, {"index": -1}, {"index": "0"}, {"index": True}, {"extra": 1}]
)  # fmt: skip
def test_states_that_are_none_are_refused(change: dict[str, int | str]) -> None:
    dataset = dataset_of([5, 6])
    with pytest.raises(FormatError, match="data position"):
        StepStream.from_state(dataset, OPTIONS, {**StepStream(dataset, OPTIONS).state(), **change})


def test_a_document_beyond_the_budget_is_found_at_once() -> None:
    with pytest.raises(DataError, match=r"the longest is a\.jsonl:2 with 13 tokens"):
        StepStream(dataset_of([5, 13]), OPTIONS)

"""Orders, splits and packing: every document once, within budgets, always the same."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.dataset import Dataset, split_by_prompt
from halfbyte.data.order import shuffled
from halfbyte.data.packing import PackingOptions, pack, plan_epoch, require_fitting
from halfbyte.data.rows import Origin
from halfbyte.data.store import StoreBuilder
from halfbyte.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=120)


def dataset_of(lengths: list[int], prompts: list[int] | None = None) -> Dataset:
    builder = StoreBuilder()
    prompts = prompts or list(range(len(lengths)))
    for number, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        origin = Origin("a.jsonl", number + 1)
        ids, trained = [number] * length, [True] * length
        builder.add(ids, trained, origin, row_digest=number, prompt_digest=prompt)
    return Dataset(builder.build(), np.arange(len(lengths), dtype=np.int64))


def test_the_order_is_fixed_for_all_time() -> None:
    # Written down once. A changed order would make old runs impossible to resume.
    assert shuffled(10, seed=0, epoch=0, purpose="documents").tolist() == [
        4,
        3,
        6,
        0,
        5,
        7,
        1,
        2,
        9,
        8,
    ]
    assert shuffled(10, seed=-1, epoch=3, purpose="steps").tolist() == [
        9,
        6,
        3,
        5,
        2,
        8,
        1,
        4,
        7,
        0,
    ]


def test_orders_differ_by_seed_epoch_and_purpose_and_look_random() -> None:
    orders = [
        shuffled(1000, seed=seed, epoch=epoch, purpose=purpose)
        for seed in (0, 1)
        for epoch in (0, 1)
        for purpose in ("documents", "steps")
    ]
    identity = np.arange(1000)
    for number, order in enumerate(orders):
        assert sorted(order.tolist()) == identity.tolist()
        # Correlation of independent orders has a standard deviation of 1 / sqrt(1000) = 0.032.
        for other in [identity, *orders[:number]]:
            assert abs(np.corrcoef(order, other)[0, 1]) < 5 * 0.032


def test_every_place_of_a_small_order_is_equally_likely() -> None:
    counts = np.zeros((4, 4))
    for epoch in range(4000):
        counts[np.arange(4), shuffled(4, seed=0, epoch=epoch, purpose="documents")] += 1
    # Binomial(4000, 1/4): standard deviation 27.
    assert abs(counts - 1000).max() < 5 * 27


@given(LENGTHS, st.integers(50, 400), st.integers(0, 5), st.booleans())
def test_an_epoch_holds_every_document_once_within_the_budget(
    lengths: list[int], budget: int, epoch: int, group: bool
) -> None:
    options = PackingOptions(budget, budget, seed=7, group_by_length=group)
    array = np.asarray(lengths, dtype=np.int64)
    plan = plan_epoch(array, options, epoch)
    steps = [plan.documents(step) for step in range(plan.num_steps)]
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(lengths)))
    assert all(0 < array[step].sum() <= budget for step in steps)
    if not group:  # greedy: no document of the next step would still have fitted
        for step, following in pairwise(steps):
            assert array[step].sum() + array[following[0]] > budget


@given(LENGTHS, st.integers(50, 400))
def test_micro_batches_hold_every_document_once_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    batches = pack(lengths, budget)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    totals = [sum(lengths[position] for position in batch) for batch in batches]
    assert max(totals) <= budget
    # First fit leaves at most one micro-batch half empty.
    assert sum(2 * total <= budget for total in totals) <= 1


def test_what_a_step_learns_from_does_not_depend_on_the_micro_batch() -> None:
    lengths = np.arange(1, 40, dtype=np.int64)
    plans = [plan_epoch(lengths, PackingOptions(100, micro), 0) for micro in (40, 100)]
    assert plans[0].order.tolist() == plans[1].order.tolist()
    assert plans[0].bounds.tolist() == plans[1].bounds.tolist()


def test_grouping_puts_similar_lengths_together_and_stays_random() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 5000)
    grouped, plain = (
        plan_epoch(lengths, PackingOptions(1000, 1000, group_by_length=group), 0)
        for group in (True, False)
    )
    spread = [
        np.mean([lengths[plan.documents(s)].std() for s in range(plan.num_steps)])
        for plan in (grouped, plain)
    ]
    assert spread[0] < spread[1] / 4
    means = [lengths[grouped.documents(s)].mean() for s in range(grouped.num_steps)]
    # 250 steps: the correlation of neighbours has a standard deviation of 0.063.
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 5 * 0.063


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (PackingOptions(tokens_per_step=100, micro_batch_tokens=30), "micro_batch_tokens = 30"),
        (PackingOptions(tokens_per_step=30, micro_batch_tokens=100), "tokens_per_step = 30"),
    ],
)
def test_documents_that_do_not_fit_are_found_before_the_start(
    options: PackingOptions, setting: str
) -> None:
    with pytest.raises(DataError) as caught:
        require_fitting(dataset_of([5, 31, 40, 7]), options)
    message = str(caught.value)
    assert f"2 of 4 documents do not fit training.{setting}; the longest is a.jsonl:3" in message
    assert "to 40, or lower data.max_length to 30" in message


def test_an_empty_dataset_fits_nothing() -> None:
    with pytest.raises(DataError, match="no documents"):
        require_fitting(dataset_of([]), PackingOptions(1, 1))


@pytest.mark.parametrize("name", ["tokens_per_step", "micro_batch_tokens"])
def test_budgets_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"training.{name}: at least 1 expected, found 0"):
        PackingOptions(**{"tokens_per_step": 1, "micro_batch_tokens": 1, name: 0})


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=60),
    st.floats(0.01, 0.99),
    st.data(),
)
def test_a_split_keeps_prompts_together(
    digests: list[int], fraction: float, data: st.DataObject
) -> None:
    prompts = data.draw(st.lists(st.sampled_from(digests), min_size=2, max_size=200))
    dataset = dataset_of([1] * len(prompts), prompts)
    if len(set(prompts)) < 2:
        with pytest.raises(DataError, match="two different prompts, found 1"):
            split_by_prompt(dataset, fraction)
        return
    train, held_out = split_by_prompt(dataset, fraction)
    assert sorted([*train.index, *held_out.index]) == list(range(len(prompts)))
    on_side = [{prompts[d] for d in side.index} for side in (train, held_out)]
    assert on_side[0]
    assert on_side[1]
    assert not on_side[0] & on_side[1]


def test_a_split_has_the_asked_size() -> None:
    digests = np.random.default_rng(0).integers(0, 2**63, 1000).tolist()
    _, held_out = split_by_prompt(dataset_of([1] * 1000, digests), 0.1)
    assert len(held_out) == 100


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_fractions_outside_of_0_and_1(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval_fraction: between 0 and 1"):
        split_by_prompt(dataset_of([1, 1]), fraction)

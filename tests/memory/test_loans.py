"""Memory that a pool borrows: what it spares, and that it is repaid."""

import random

import pytest

from memory.fake_tier import FakeTier
from memory.test_pairs import SIZES, Model
from memory.test_pool import PAGE

ALL = list(range(len(SIZES)))
ENOUGH = 100 * PAGE


def after_two_steps(pages: int) -> Model:
    """A model whose state fills its pages."""
    model = Model(FakeTier(delay=0.0005), pages)
    for number in range(2):
        model.accumulate(ALL, number)
        model.step(spend=True)
    return model


def moved_by_a_step(model: Model, loan: int) -> tuple[int, int]:
    """Bytes in and out."""
    before = model.pool.stats()
    model.pool.borrow(loan)
    model.accumulate(ALL[::-1], 7)
    model.step(spend=True)
    moved = model.pool.stats().since(before)
    return moved.paged_in_bytes, moved.paged_out_bytes


@pytest.mark.parametrize("pages", [2, 3, 8])
def test_what_is_changed_on_loan_is_neither_written_nor_read(pages: int) -> None:
    with_loan, without = after_two_steps(pages), after_two_steps(pages)
    state = sum(page.num_bytes for item in with_loan.items for page in pages_of(with_loan, item))
    came, went = moved_by_a_step(with_loan, ENOUGH)
    assert came <= state
    assert went <= state
    more_came, more_went = moved_by_a_step(without, 0)
    assert more_came > came
    assert more_went > went
    assert with_loan.pool.resident_bytes <= pages * PAGE
    for model in (with_loan, without):
        model.check(3)
    for one, other in zip(with_loan.found, without.found, strict=True):
        assert one.equal(other)


def pages_of(model: Model, item: int) -> set[object]:
    """Counted once, by the item that stands first in them."""
    places = model.pool._places
    return {page for page, part in places[item] if part is page.parts[0]}


def test_a_loan_is_repaid_when_it_is_called_back() -> None:
    model = after_two_steps(3)
    model.pool.borrow(5 * PAGE)
    model.accumulate(ALL, 0)
    assert 3 * PAGE < model.pool.resident_bytes <= 8 * PAGE
    model.pool.borrow(PAGE)
    assert model.pool.resident_bytes <= 4 * PAGE
    model.pool.borrow(0)
    assert model.pool.resident_bytes <= 3 * PAGE
    model.step(spend=True)
    model.check(3)


def test_a_loan_ends_with_the_walk() -> None:
    model = after_two_steps(3)
    model.pool.borrow(ENOUGH)
    model.step(spend=True)
    model.accumulate(ALL, 0)
    model.step(spend=True)
    model.pool.prefetch()
    assert model.pool.resident_bytes <= 3 * PAGE


def test_prefetching_leaves_room_for_what_will_be_changed() -> None:
    model = after_two_steps(2)
    model.pool.borrow(10 * PAGE)
    before = model.pool.resident_bytes
    model.pool.prefetch(leave=10 * PAGE)
    assert model.pool.resident_bytes == before
    model.pool.prefetch(leave=8 * PAGE - 1)
    assert model.pool.resident_bytes == before + 2 * PAGE


@pytest.mark.parametrize("seed", range(15))
def test_random_loans(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311
    pages = rng.choice([2, 3, 5, 9])
    model = Model(FakeTier(delay=rng.choice([0, 0.0005]), seed=seed), pages)
    for number in range(8):
        loan = 0
        for _ in range(rng.randrange(3)):
            loan = rng.choice([0, 1, 4, 30]) * PAGE
            model.pool.borrow(loan)
            model.accumulate(rng.sample(ALL, rng.randrange(len(ALL))), number)
            assert model.pool.resident_bytes <= pages * PAGE + loan
            model.pool.prefetch(leave=rng.choice([0, 3]) * PAGE)
        for place in ALL:
            for chunk in model.pool.update(model.beside[place]):
                chunk.values[0].copy_(model.sums[place][chunk.begin : chunk.end])
        model.step(spend=True)
        for one, other in zip(model.found, model.sums, strict=True):
            assert one.equal(other)
        for sums in model.sums:
            sums.zero_()
        assert model.pool.resident_bytes <= pages * PAGE
    model.check(8)


def test_a_disk_that_fails_while_a_loan_is_repaid_loses_nothing() -> None:
    tier = FakeTier()
    model = Model(tier, 3)
    model.accumulate(ALL, 0)
    model.step(spend=True)
    model.pool.borrow(ENOUGH)
    model.accumulate(ALL, 1)
    tier.broken_writes = True
    model.step(spend=True)  # completed in memory
    assert model.pool.resident_bytes > 3 * PAGE
    model.check(2)

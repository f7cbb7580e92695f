"""Items that are visited together, though their pages move separately."""

import random

import pytest
import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.memory.layout import Field, Item
from halfbyte.memory.pool import Pool
from memory.fake_tier import FakeTier
from memory.test_pool import BYTES, FLOAT, PAGE

SIZES = [5000, 3, 0, 9000, 700, 1, 2000]
GRADIENT = (Field("gradient", torch.float32),)


class Model:
    """Items with companions, and the same in plain tensors."""

    def __init__(self, tier: FakeTier, pages: int, *, companions_first: bool = True) -> None:
        fields = [BYTES if number % 2 else FLOAT for number in range(len(SIZES))]
        items = [Item(f"i{n}", s, f) for n, (s, f) in enumerate(zip(SIZES, fields, strict=True))]
        beside = [Item(f"g{n}", i.num_elements, GRADIENT, i.granule) for n, i in enumerate(items)]
        self.pool = Pool(tier, fast_bytes=pages * PAGE, page_bytes=PAGE)
        if companions_first:
            self.beside, self.items = self.pool.add(beside), self.pool.add(items)
        else:
            self.items, self.beside = self.pool.add(items), self.pool.add(beside)
        self.pool.pair(zip(self.beside, self.items, strict=True))
        self.sums = [torch.zeros(size) for size in SIZES]
        self.found = [torch.zeros(size) for size in SIZES]

    def accumulate(self, order: list[int], number: int) -> None:
        """Add to the companions, one after the other."""
        for place in order:
            added = torch.arange(SIZES[place], dtype=torch.float32) % 97 + number
            self.sums[place] += added
            for chunk in self.pool.update(self.beside[place]):
                chunk.values[0].add_(added[chunk.begin : chunk.end])

    def step(self, *, spend: bool) -> None:
        """Visit all; every element once, with its companion."""
        seen = [torch.zeros(size) for size in SIZES]
        for chunk in self.pool.walk(self.items, spend=spend):
            place = chunk.item - self.items.start
            part = slice(chunk.begin, chunk.end)
            seen[place][part] += 1
            self.found[place][part] = chunk.beside[0]
            for field, value in zip(self.pool.items[chunk.item].fields, chunk.values, strict=True):
                assert value.numel() == field.count(chunk.end - chunk.begin)
                value.add_(1)
        assert all(bool((one == 1).all()) for one in seen)

    def check(self, steps: int) -> None:
        for item in self.items:
            for value in self.pool.read(item):
                assert bool((value == steps).all())


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("companions_first", [True, False])
@pytest.mark.parametrize("pages", [2, 3, 5, 13, 1000])
def test_every_element_meets_its_companion(pages: int, companions_first: bool) -> None:
    model = Model(FakeTier(delay=0.0003), pages, companions_first=companions_first)
    rng = random.Random(pages)  # noqa: S311
    for step in range(4):
        for micro_batch in range(2):
            model.accumulate(rng.sample(range(len(SIZES)), len(SIZES)), micro_batch)
        model.step(spend=step % 2 == 1)
        assert_equal(model.found, model.sums)
        if step % 2 == 1:
            model.sums = [torch.zeros_like(one) for one in model.sums]
    model.check(4)
    assert model.pool.stats().peak_resident_bytes <= pages * PAGE


def test_a_budget_may_change_while_two_pages_are_at_work() -> None:
    model = Model(FakeTier(delay=0.0003), 20)
    model.accumulate([0, 3, 6, 1, 4, 5], 1)
    resident = []
    for number, chunk in enumerate(model.pool.walk(model.items)):
        if number == 2:
            model.pool.set_budget(2 * PAGE)
        resident.append(model.pool.stats().resident_bytes)
        model.found[chunk.item - model.items.start][chunk.begin : chunk.end] = chunk.beside[0]
    assert_equal(model.found, model.sums)
    assert resident[-1] <= 2 * PAGE < resident[1]


def test_what_is_spent_is_neither_written_nor_read_again() -> None:
    tier = FakeTier()
    model = Model(tier, 1000)
    model.accumulate([0, 3], 1)
    model.step(spend=True)
    model.pool.set_budget(2 * PAGE)
    gradients = sum(4 * size for size in SIZES)
    assert model.pool.stats().paged_out_bytes <= model.pool.stats().total_bytes - gradients
    reads = tier.reads
    assert not any(model.pool.read(item)[0].any() for item in model.beside)
    assert tier.reads == reads


def test_what_is_forgotten_is_zero_unless_it_shares_a_page() -> None:
    tier = FakeTier()
    model = Model(tier, 2)
    model.accumulate([0, 3, 6], 1)
    model.pool.forget(set(model.beside))
    writes = tier.writes
    assert not any(model.pool.read(item)[0].any() for item in model.beside)
    assert tier.writes == writes
    model.sums = [torch.zeros_like(one) for one in model.sums]
    model.accumulate([4, 6], 2)
    model.pool.forget({model.beside[4]})
    assert torch.equal(model.pool.read(model.beside[6])[0], model.sums[6])


def test_items_that_cannot_be_paired_are_named() -> None:
    pool = Pool(FakeTier(), fast_bytes=8 * PAGE, page_bytes=PAGE)
    long, short, coarse = pool.add(
        [Item("long", 9, FLOAT), Item("short", 8, FLOAT), Item("coarse", 9, FLOAT, 256)]
    )
    for other in (short, coarse):
        with pytest.raises(UsageError, match=r"long and .* differ"):
            pool.pair([(long, other)])

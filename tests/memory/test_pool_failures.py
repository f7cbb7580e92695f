"""Storage that is full or broken: whole or not at all."""

import pytest
import torch

from halfbyte.errors import StorageError
from halfbyte.memory.layout import Field, Item
from halfbyte.memory.transfers import ATTEMPTS
from memory.fake_tier import FakeTier, wait_until
from memory.test_pool import ITEMS, PAGE, Mirror, change, made


def test_a_full_tier_refuses_items_before_anything_moves() -> None:
    tier = FakeTier()
    tier.capacity = 5 * PAGE
    pool, mirror = made(tier, 2, [ITEMS[1]]), Mirror([ITEMS[1]])
    mirror.step(pool, 1)
    with pytest.raises(StorageError, match="cannot reserve"):
        pool.add([Item("large", 100 * PAGE, (Field("a", torch.float32),))])
    assert len(pool.items) == 1
    mirror.step(pool, 2)
    mirror.check(pool)


def test_a_full_tier_refuses_a_smaller_budget() -> None:
    tier = FakeTier()
    tier.capacity = 0
    pool, mirror = made(tier, 100), Mirror(ITEMS)
    mirror.step(pool, 1)
    with pytest.raises(StorageError, match="cannot reserve"):
        pool.set_budget(2 * PAGE)
    assert pool.stats().fast_bytes == 100 * PAGE
    mirror.step(pool, 2)
    mirror.check(pool)


@pytest.mark.parametrize("pages", [2, 3, 6])
@pytest.mark.parametrize("breaks_at", [0, 3, 9])
def test_a_broken_disk_lets_the_walk_end_and_the_state_be_read(pages: int, breaks_at: int) -> None:
    tier = FakeTier(delay=0.0003)
    pool, mirror = made(tier, pages), Mirror(ITEMS)
    mirror.step(pool, 1)
    for number, chunk in enumerate(pool.walk()):
        if number == breaks_at:
            tier.broken_writes = True
        for value in chunk.values:
            change(value, 2)
    for values in mirror.values:
        for value in values:
            change(value, 2)
    mirror.check(pool)
    with pytest.raises(StorageError, match="Input/output error") as caught:
        mirror.step(pool, 3)
    assert "can still be exported" in str(caught.value)
    mirror.check(pool)  # the refused walk changed nothing
    with pytest.raises(StorageError):
        pool.write(0, pool.read(0))
    mirror.check(pool)


def test_a_budget_that_cannot_be_met_says_so() -> None:
    tier = FakeTier()
    pool, mirror = made(tier, 100), Mirror(ITEMS)
    mirror.step(pool, 1)
    tier.broken_writes = True
    with pytest.raises(StorageError, match="writing to the fake tier failed"):
        pool.set_budget(2 * PAGE)
    mirror.check(pool)


def test_a_passing_fault_is_not_noticed() -> None:
    tier = FakeTier()
    pool, mirror = made(tier, 2), Mirror(ITEMS)
    for number in range(8):
        tier.failures_left = 2
        mirror.step(pool, number)
    mirror.check(pool)


def test_a_prefetch_that_fails_is_tried_again_when_needed() -> None:
    tier = FakeTier()
    pool = made(tier, 2, [Item("x", 8 * PAGE // 8, ITEMS[0].fields)])
    mirror = Mirror(list(pool.items))
    mirror.step(pool, 1)
    pool.set_budget(3 * PAGE)
    tier.broken_reads = True
    pool.prefetch()
    wait_until(lambda: tier.reads >= ATTEMPTS)
    tier.broken_reads = False
    mirror.step(pool, 2)
    mirror.check(pool)


def test_a_page_that_is_lost_closes_the_pool() -> None:
    tier = FakeTier()
    pool, mirror = made(tier, 2), Mirror(ITEMS)
    mirror.step(pool, 1)
    tier.broken_reads = True
    with pytest.raises(StorageError, match="could not be read back") as caught:
        mirror.step(pool, 2)
    assert "last checkpoint" in str(caught.value)
    tier.broken_reads = False
    with pytest.raises(StorageError, match="could not be read back"):
        mirror.step(pool, 3)
    with pytest.raises(StorageError, match="could not be read back"):
        pool.read(0)

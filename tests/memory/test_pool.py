"""A pool behaves as plain memory under every budget, and moves no more than it must."""

import gc
import random
import threading

import pytest
import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.memory.layout import Field, Item
from halfbyte.memory.pool import Pool
from halfbyte.memory.stats import PoolStats
from memory.fake_tier import FakeTier, wait_until

PAGE = 4096
FLOAT = (Field("a", torch.float32), Field("b", torch.float32))
BYTES = (Field("codes", torch.uint8), Field("scales", torch.float32, 256))
SIZES = [
    (5000, FLOAT),
    (3, FLOAT),
    (0, FLOAT),
    (9000, BYTES),
    (700, FLOAT),
    (1, BYTES),
    (2000, BYTES),
]
ITEMS = [Item(f"item {n}", size, fields) for n, (size, fields) in enumerate(SIZES)]


class Mirror:
    """The same items in plain tensors, changed in the same way."""

    def __init__(self, items: list[Item]) -> None:
        self.values = [
            [torch.zeros(f.count(item.num_elements), dtype=f.dtype) for f in item.fields]
            for item in items
        ]

    def step(self, pool: Pool, number: int, items: list[int] | None = None) -> int:
        """Change both, element by element, in a way that no other order of steps gives."""
        chunks = 0
        for chunk in pool.walk(items):
            chunks += 1
            for place, value in enumerate(chunk.values):
                change(value, number)
                field = pool.items[chunk.item].fields[place]
                start = chunk.begin // field.elements
                change(self.values[chunk.item][place][start : start + value.numel()], number)
        return chunks

    def check(self, pool: Pool) -> None:
        for item, expected in enumerate(self.values):
            found = pool.read(item)
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b), pool.items[item]


def change(value: Tensor, number: int) -> None:
    value.mul_(3).add_(number)


def made(tier: FakeTier, pages: int, items: list[Item] = ITEMS) -> Pool:
    pool = Pool(tier, fast_bytes=pages * PAGE, page_bytes=PAGE)
    pool.add(items)
    return pool


@pytest.mark.parametrize("pages", [2, 3, 4, 7, 15, 100])
def test_every_budget_gives_what_memory_gives(pages: int) -> None:
    pool, mirror = made(FakeTier(delay=0.0005), pages), Mirror(ITEMS)
    for number in range(6):
        mirror.step(pool, number)
    mirror.check(pool)
    stats = pool.stats()
    assert stats.peak_resident_bytes <= pages * PAGE
    assert stats.fast_bytes == pages * PAGE
    assert stats.hits + stats.prefetched + stats.misses > 0


@pytest.mark.parametrize("seed", range(25))
def test_random_budgets_subsets_reads_and_writes(seed: int) -> None:
    """Whatever is done between and during walks, nothing is lost and the budget holds."""
    rng = random.Random(seed)  # noqa: S311
    tier = FakeTier(delay=rng.choice([0, 0.0005]), seed=seed)
    pool, mirror = made(tier, 2), Mirror(ITEMS)
    held = 2
    for number in range(12):
        action = rng.randrange(6)
        if action == 0:
            held = rng.choice([2, 3, 5, 9, 40])
            pool.set_budget(held * PAGE)
            assert pool.stats().resident_bytes <= held * PAGE
        elif action == 1:
            item = rng.randrange(len(ITEMS))
            new = [torch.randint(0, 99, v.shape).to(v.dtype) for v in mirror.values[item]]
            pool.write(item, new)
            mirror.values[item] = new
        elif action == 2:
            pool.prefetch()
        elif action == 3:
            mirror.check(pool)
        else:
            some = (
                rng.sample(range(len(ITEMS)), rng.randrange(1, len(ITEMS))) if action == 4 else None
            )
            mirror.step(pool, number, some)
        assert pool.stats().resident_bytes <= held * PAGE
    mirror.check(pool)
    pool.close()
    assert tier.closed


def test_items_may_be_added_later() -> None:
    pool, mirror = made(FakeTier(), 2), Mirror(ITEMS)
    mirror.step(pool, 1)
    assert pool.add([Item("late", 3000, FLOAT)]) == range(len(ITEMS), len(ITEMS) + 1)
    mirror.values += Mirror([pool.items[-1]]).values
    mirror.step(pool, 2)
    mirror.check(pool)


def test_a_budget_for_all_moves_nothing_and_reserves_nothing() -> None:
    tier = FakeTier()
    pool, mirror = made(tier, 100), Mirror(ITEMS)
    for number in range(3):
        mirror.step(pool, number)
    stats = pool.stats()
    assert (tier.reads, tier.writes, tier.reserved) == (0, 0, 0)
    assert (stats.paged_in_bytes, stats.paged_out_bytes, stats.misses) == (0, 0, 0)
    assert stats.resident_bytes == -(-stats.total_bytes // PAGE) * PAGE


@pytest.mark.parametrize("budget", [2, 5, 9])
def test_a_walk_moves_only_what_the_budget_cannot_hold(budget: int) -> None:
    pages = 12
    pool = made(FakeTier(), budget, [Item("x", pages * PAGE // 8, FLOAT)])
    mirror = Mirror(list(pool.items))
    for number in range(4):
        mirror.step(pool, number)
    before = pool.stats()
    for number in range(4):
        mirror.step(pool, number)
    moved = pool.stats().since(before)
    assert moved.hits == 4 * budget
    assert moved.prefetched + moved.misses == 4 * (pages - budget)
    # What is under way at the ends of the measurement belongs to the walk before or after.
    assert abs(moved.paged_in_bytes - 4 * (pages - budget) * PAGE) <= 3 * PAGE
    assert abs(moved.paged_out_bytes - 4 * (pages - budget) * PAGE) <= 3 * PAGE


def test_what_is_only_read_is_not_written_back() -> None:
    tier = FakeTier()
    pool, mirror = made(tier, 2), Mirror(ITEMS)
    mirror.step(pool, 1)
    mirror.check(pool)  # the last dirty pages leave here
    writes = tier.writes
    mirror.check(pool)
    assert tier.writes == writes


def test_transfers_overlap_the_work() -> None:
    """With a page's work at least as long as its transfers, nearly all pages arrive in time."""
    tier = FakeTier()
    pool = made(tier, 5, [Item("x", 30 * PAGE // 8, FLOAT)])
    for _ in range(2):
        for _chunk in pool.walk():
            wait_until(lambda: all(job.future.done() for job in pool._buffers.jobs))
    stats = pool.stats()
    assert stats.prefetched > 20
    assert stats.misses <= 3


def test_prefetch_fills_a_budget_that_grew() -> None:
    tier = FakeTier()
    pool = made(tier, 2, [Item("x", 8 * PAGE // 8, FLOAT)])
    mirror = Mirror(list(pool.items))
    mirror.step(pool, 1)
    pool.set_budget(5 * PAGE)
    before = pool.stats()
    reads = tier.reads
    pool.prefetch()
    wait_until(lambda: tier.reads == reads + 3)
    mirror.step(pool, 2)
    moved = pool.stats().since(before)
    assert (moved.hits, moved.prefetched >= 3) == (2, True)
    mirror.check(pool)


def test_a_budget_shrinks_during_a_walk_from_another_thread() -> None:
    tier = FakeTier(delay=0.0005)
    pool, mirror = made(tier, 20), Mirror(ITEMS)
    mirror.step(pool, 1)
    seen = []
    for number, chunk in enumerate(pool.walk()):
        if number == 3:
            other = threading.Thread(target=pool.set_budget, args=(2 * PAGE,))
            other.start()
            other.join()
            page_of_change = chunk.item, chunk.begin
        seen.append(pool.stats().resident_bytes)
        for value in chunk.values:
            change(value, 2)
    assert page_of_change
    for values in mirror.values:
        for value in values:
            change(value, 2)
    assert seen[2] > 2 * PAGE
    assert seen[-1] <= 2 * PAGE
    mirror.check(pool)


def test_a_budget_makes_room_and_grows_back() -> None:
    tier = FakeTier()
    pool, mirror = made(tier, 10), Mirror(ITEMS)
    mirror.step(pool, 1)
    held = pool.stats().resident_bytes
    tier.free = 3 * PAGE
    assert pool.make_room(7 * PAGE, most=10 * PAGE) == held - 4 * PAGE
    assert pool.stats().resident_bytes == held - 4 * PAGE
    tier.free = 0
    assert pool.make_room(2**40, most=10 * PAGE) == 2 * PAGE
    assert pool.stats().resident_bytes == 2 * PAGE
    tier.free = 2**40
    assert pool.make_room(0, most=10 * PAGE) == 10 * PAGE
    mirror.step(pool, 2)
    mirror.check(pool)


def test_a_walk_that_is_left_early_keeps_what_was_done() -> None:
    pool = made(FakeTier(), 2, [Item("x", 6 * PAGE // 8, FLOAT)])
    for number, chunk in enumerate(pool.walk()):
        if number == 2:
            break
        chunk.values[0].fill_(1)
    first, _ = pool.read(0)
    assert first.sum() == 2 * PAGE // 8


@pytest.mark.parametrize(
    ("fast_bytes", "page_bytes"),
    [
        pytest.param(128 * 10**6, 2**22, id="as-large-as-they-get"),
        pytest.param(2**25, 2**22, id="just-eight"),
        pytest.param(2**25 - 1, 2**21, id="more-than-eight"),
        pytest.param(2**23, 2**20, id="8-MiB"),
        pytest.param(2**19, 2**18, id="as-small-as-they-get"),
    ],
)
def test_pages_fit_the_budget_eight_times(fast_bytes: int, page_bytes: int) -> None:
    pool = Pool(FakeTier(), fast_bytes=fast_bytes)
    pool.set_budget(2 * page_bytes)
    with pytest.raises(UsageError, match=f"2 pages of {page_bytes} bytes"):
        pool.set_budget(2 * page_bytes - 1)


@pytest.mark.parametrize(
    ("fast_bytes", "page_bytes", "message"),
    [
        (2**19 - 1, None, "2 pages of 262144"),
        (2 * PAGE - 1, PAGE, "2 pages of 4096"),
        (2**20, 5000, "multiple of 4096"),
        (2**20, 0, "multiple"),
    ],
)
def test_budgets_and_pages_that_cannot_work(
    fast_bytes: int, page_bytes: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Pool(FakeTier(), fast_bytes=fast_bytes, page_bytes=page_bytes)
    pool = made(FakeTier(), 3)
    with pytest.raises(UsageError, match="2 pages"):
        pool.set_budget(PAGE)
    assert pool.stats().fast_bytes == 3 * PAGE


def test_a_page_too_small_for_a_block_is_refused() -> None:
    wide = Item("x", 10, (Field("a", torch.float32), Field("b", torch.float32, 4096)))
    pool = made(FakeTier(), 2)
    with pytest.raises(UsageError, match="page_bytes: at least"):
        pool.add([wide])
    assert len(pool.items) == len(ITEMS)


def test_the_threads_end_with_the_last_reference() -> None:
    tier = FakeTier()
    pool = made(tier, 2)
    Mirror(ITEMS).step(pool, 1)
    del pool
    gc.collect()
    assert tier.closed
    assert not [t for t in threading.enumerate() if t.name.startswith("pool")]


def test_stats_make_a_record() -> None:
    record = PoolStats(hits=3).record()
    assert record["hits"] == 3
    assert set(record) >= {"resident_bytes", "paged_in_bytes", "paged_out_bytes", "stall_seconds"}

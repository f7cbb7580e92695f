"""Pages under a byte budget: the few at work are in fast memory, the rest in a slower tier.

The pool knows items and pages, not what they are for. Its owner *walks* the pages: for each part
of each item it gets views of the values and changes them in place. Meanwhile threads write back
pages that the walk has left and read those it will need.

Each walk goes the other way than the last, so what the last walk left in memory is what the
next needs first, and the page passed longest ago is always the right one to give up: with
a budget of K out of N pages, N - K move in and out a walk, which is the least possible.

Nothing is half-done when storage fails. Room for every page is reserved before a walk begins. A
page that cannot be written stays in memory, over budget, so that the walk still ends; the next
walk then refuses to start, and everything can still be read out. Only a page that cannot be
read back, after retries, is lost; then the pool refuses everything.
"""

import time
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import RLock

import torch
from torch import Tensor

from halfbyte.errors import StorageError, UsageError
from halfbyte.memory.layout import Item, lay_out, smallest_page
from halfbyte.memory.stats import PoolStats
from halfbyte.memory.tiers import BLOCK, Tier
from halfbyte.memory.transfers import Job, Page, start

PAGE_BYTES = 2**22
"""Large enough for a disk to reach its speed, small enough for a budget of a few MB."""
MIN_PAGES = 2
"""One at work and one on its way."""

_IN_FLIGHT = 3  # transfers queued ahead of a walk
_THREADS = 2  # so that a read need not wait for a write
_READ_FAILURES = 2  # a failed prefetch is tried once more when the page is needed


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an item at work: a view of each field, flat, to be changed in place."""

    item: int
    begin: int
    end: int
    values: tuple[Tensor, ...]


@dataclass(slots=True)
class _Walk:
    """The order of a walk, how far it is, and how far ahead pages have been asked for."""

    order: list[Page]
    at: int = 0
    ahead: int = 0
    passed: deque[Page] = field(default_factory=deque)  # to give up, the first first


class Pool:
    """Items in pages, of which at most `fast_bytes` are in fast memory.

    One thread at a time walks, reads or writes; `set_budget` may be called from any thread.

    Raises:
        UsageError: The budget has no room for two pages.
    """

    def __init__(self, tier: Tier, *, fast_bytes: int, page_bytes: int = PAGE_BYTES) -> None:
        """Begin empty; the budget holds `fast_bytes // page_bytes` pages."""
        if page_bytes < BLOCK or page_bytes % BLOCK:
            raise UsageError(f"page_bytes: a multiple of {BLOCK} expected, found {page_bytes}")
        self._tier = tier
        self._page_bytes = page_bytes
        self._budget = self._checked(fast_bytes)
        self._items: list[Item] = []
        self._pages: list[Page] = []
        self._pages_of: list[list[Page]] = []  # by item
        self._jobs: deque[Job] = deque()
        self._num_buffers = 0
        self._forward = True
        self._walk: _Walk | None = None
        self._failure: StorageError | None = None
        self._lost: StorageError | None = None
        self._counters = PoolStats()
        self._lock = RLock()
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="pool")
        self._finalizer = weakref.finalize(self, _close, self._executor, tier)

    def close(self) -> None:
        """End the threads and give back the slow tier. Also happens with the last reference."""
        self._finalizer()

    @property
    def items(self) -> Sequence[Item]:
        """All items; an item's number is its place."""
        return self._items

    def stats(self) -> PoolStats:
        """The counters, and what is held now."""
        return replace(
            self._counters,
            fast_bytes=self._budget,
            total_bytes=sum(page.num_bytes for page in self._pages),
            resident_bytes=self._num_buffers * self._page_bytes,
            cached_bytes=self._tier.cached_bytes(),
            slow_tier=self._tier.describe(),
        )

    def add(self, items: Sequence[Item]) -> range:
        """Append items, all zero, and return their numbers.

        Raises:
            StorageError: The slow tier has no room; nothing was added.
            UsageError: A page is too small to hold a block of an item.
        """
        if (need := smallest_page(items)) > self._page_bytes:
            raise UsageError(f"page_bytes: at least {need} expected, found {self._page_bytes}")
        numbers = range(len(self._items), len(self._items) + len(items))
        pages: list[Page] = []
        for parts in lay_out(items, first=numbers.start, page_bytes=self._page_bytes):
            position = (len(self._pages) + len(pages)) * self._page_bytes
            last = parts[-1]
            used = last.offsets[-1] + items[last.item - numbers.start].fields[-1].num_bytes(
                last.end - last.begin
            )
            pages.append(Page(parts, position, -(-used // BLOCK) * BLOCK))
        with self._lock:
            self._reserve(len(self._pages) + len(pages), self._budget)
            self._items += items
            self._pages += pages
            self._pages_of += [[] for _ in items]
        for page in pages:
            for part in page.parts:
                self._pages_of[part.item].append(page)
        return numbers

    def set_budget(self, fast_bytes: int) -> None:
        """Change the budget.

        Outside a walk, memory above it has been given back on return. A walk under way gives it
        back before it goes on to its next page.

        Raises:
            UsageError: There is no room for two pages.
            StorageError: The slow tier has no room for what must leave, and the budget is
                unchanged; or writing to it failed.
        """
        fast_bytes = self._checked(fast_bytes)
        with self._lock:
            self._reserve(len(self._pages), fast_bytes)
            self._budget = fast_bytes
            if self._walk is None:
                self._settle()
                self.require_usable()

    def make_room(self, num_bytes: int, *, most: int) -> int:
        """Set the budget to what is left when others take `num_bytes`, and return it.

        Args:
            num_bytes: What is about to be taken of the fast memory that is free by now.
            most: The budget when memory is plentiful; the least is two pages.

        Raises:
            StorageError: As `set_budget`.
        """
        held = self._num_buffers * self._page_bytes
        left = held + self._tier.free_bytes() - num_bytes
        budget = max(min(most, left), MIN_PAGES * self._page_bytes)
        self.set_budget(budget)
        return budget

    def prefetch(self) -> None:
        """Begin to fill the budget with what the next walk needs first, and return at once."""
        with self._lock:
            if self._walk is not None or self._failure or self._lost:
                return
            self._reap()
            for page in self._ordered(self._pages):
                if len(self._jobs) >= _IN_FLIGHT or self._num_buffers >= self._capacity:
                    break
                if page.stored and page.buffer is None and page.job is None:
                    page.prefetched = True
                    self._transfer(None, page)

    def walk(self, items: Collection[int] | None = None) -> Iterator[Chunk]:
        """Visit the parts of some or all items, page by page, to change them in place.

        The views of a chunk are valid until the next one is asked for. Nobody may rely on the
        order.

        Raises:
            StorageError: Before the first chunk: storage failed during an earlier walk. Later: a
                page could not be read back, and is lost.
        """
        with self._lock:
            self._reap()
        self.require_usable()
        wanted = None if items is None else frozenset(items)
        pages = self._pages
        if wanted is not None:
            pages = [p for p in pages if any(part.item in wanted for part in p.parts)]
        order = list(self._ordered(pages))
        self._forward = not self._forward
        yield from self._visit(order, wanted, change=True)

    def read(self, item: int) -> tuple[Tensor, ...]:
        """A copy of an item's fields, each flat.

        Raises:
            StorageError: A page was lost.
        """
        found = self._items[item]
        copies: list[Tensor] = []
        for chunk in self._visit(self._pages_of[item], {item}, change=False):
            if not copies:
                copies = [
                    value.new_empty(each.count(found.num_elements))
                    for each, value in zip(found.fields, chunk.values, strict=True)
                ]
            for each, copy, value in zip(found.fields, copies, chunk.values, strict=True):
                start = chunk.begin // each.elements
                copy[start : start + value.numel()] = value
        return tuple(copies) or tuple(torch.empty(0, dtype=each.dtype) for each in found.fields)

    def write(self, item: int, values: Sequence[Tensor]) -> None:
        """Replace an item's fields.

        Raises:
            StorageError: As `walk`.
        """
        self.require_usable()
        found = self._items[item]
        for chunk in self._visit(self._pages_of[item], {item}, change=True):
            for each, new, value in zip(found.fields, values, chunk.values, strict=True):
                start = chunk.begin // each.elements
                value.copy_(new.reshape(-1)[start : start + value.numel()])

    def require_usable(self) -> None:
        """Raise what made storage fail, if it did.

        Raises:
            StorageError: It did; `read` still works unless a page was lost.
        """
        if error := self._lost or self._failure:
            raise error

    # A walk: `_arrive` at each page, `_leave` it, look ahead in between.

    def _visit(
        self, order: list[Page], wanted: Collection[int] | None, *, change: bool
    ) -> Iterator[Chunk]:
        if self._lost:
            raise self._lost
        with self._lock:
            self._reap()
            asked = set(order)
            self._walk = walk = _Walk(order)
            walk.passed.extend(page for page in self._pages if page not in asked)
        try:
            for at, page in enumerate(order):
                with self._lock:
                    walk.at = at
                    buffer = self._arrive(walk, page)
                    page.dirty |= change
                for part in page.parts:
                    if wanted is None or part.item in wanted:
                        values = part.views(buffer, self._items[part.item].fields)
                        yield Chunk(part.item, part.begin, part.end, values)
                with self._lock:
                    page.fence = self._tier.fence()
                    walk.passed.append(page)
        finally:
            with self._lock:
                self._walk = None
                if self._num_buffers > self._capacity:
                    self._settle()

    def _arrive(self, walk: _Walk, page: Page) -> Tensor:
        """The page's buffer, once it is there; the following pages are on their way."""
        self._reap()
        waited = page.buffer is None and self._fetch(walk, page)
        buffer = page.buffer
        assert buffer is not None  # noqa: S101  (what `_fetch` is for)
        if not page.filled:
            buffer.zero_()
            page.filled = True
        counters = self._counters
        if waited:
            self._counters = replace(counters, misses=counters.misses + 1)
        elif page.prefetched:
            self._counters = replace(counters, prefetched=counters.prefetched + 1)
        else:
            self._counters = replace(counters, hits=counters.hits + 1)
        page.prefetched = False
        self._shrink(walk)
        self._look_ahead(walk)
        return buffer

    def _fetch(self, walk: _Walk, page: Page) -> bool:
        """Bring a page in. Returns whether it had to be waited for."""
        waited = False
        while page.buffer is None:
            if self._lost:
                raise self._lost
            if page.job is not None:
                waited |= self._finish(page.job)
            elif not self._request(walk, page, urgent=True):
                # Every buffer is on its way: the oldest transfer brings one.
                waited |= self._finish(self._jobs[0])
        return waited

    def _look_ahead(self, walk: _Walk) -> None:
        walk.ahead = max(walk.ahead, walk.at + 1)
        while walk.ahead < len(walk.order) and len(self._jobs) < _IN_FLIGHT:
            page = walk.order[walk.ahead]
            if page.buffer is None and page.job is None:
                if not self._request(walk, page, urgent=False):
                    return
                page.prefetched = page.stored
            elif page.job is not None and page.job.leaving is page:
                return
            walk.ahead += 1

    def _request(self, walk: _Walk, page: Page, *, urgent: bool) -> bool:
        """Begin to bring a page in, if there is a buffer for it."""
        if self._num_buffers < self._capacity:
            self._transfer(None, page)
            return True
        victim = self._victim(walk, urgent=urgent)
        if victim is not None:
            self._transfer(victim, page)
        return victim is not None

    def _victim(self, walk: _Walk, *, urgent: bool) -> Page | None:
        """The page to give up: passed longest ago; if it must be, the one needed last."""
        while walk.passed:
            page = walk.passed.popleft()
            if page.buffer is not None:
                return page
        if urgent:
            for place in range(len(walk.order) - 1, walk.at, -1):
                if walk.order[place].buffer is not None:
                    walk.ahead = min(walk.ahead, place)
                    return walk.order[place]
        return None

    def _shrink(self, walk: _Walk) -> None:
        """During a walk: bring the buffers down to a budget that became smaller."""
        freeing = sum(job.frees for job in self._jobs)
        while self._num_buffers - freeing > self._capacity:
            victim = self._victim(walk, urgent=True)
            if victim is not None:
                self._transfer(victim, None)
            elif self._jobs:
                self._finish(self._jobs[0])
            else:
                break
            freeing = sum(job.frees for job in self._jobs)
        while self._num_buffers > self._capacity and self._jobs:
            self._finish(self._jobs[0])

    def _settle(self) -> None:
        """Outside a walk: end all transfers, then give back what is above the budget."""
        while self._jobs:
            self._finish(self._jobs[0])
        needed_last_first = reversed(list(self._ordered(self._pages)))
        for page in needed_last_first:
            if self._num_buffers <= self._capacity:
                break
            if page.buffer is not None:
                self._transfer(page, None)
            while len(self._jobs) >= _IN_FLIGHT:
                self._finish(self._jobs[0])
            if self._num_buffers - len(self._jobs) <= self._capacity:
                break
        while self._jobs:
            self._finish(self._jobs[0])

    def _ordered(self, pages: list[Page]) -> Iterator[Page]:
        return iter(pages) if self._forward else reversed(pages)

    # Transfers: begun by `_transfer`, ended by `_finish`, both on the owner's thread.

    def _transfer(self, leaving: Page | None, coming: Page | None) -> None:
        """Let one page take the place of another."""
        if leaving is None:
            buffer = self._tier.buffer(self._page_bytes)
            self._count_buffers(1)
        else:
            assert leaving.buffer is not None  # noqa: S101  (victims have one)
            buffer = leaving.buffer
            leaving.buffer = None
        job = start(self._executor, self._tier, leaving, coming, buffer)
        for page in (leaving, coming):
            if page is not None:
                page.job = job
        self._jobs.append(job)
        if job.future.done():
            self._finish(job)

    def _reap(self) -> None:
        """Take note of the transfers that have ended."""
        for job in [job for job in self._jobs if job.future.done()]:
            self._finish(job)

    def _finish(self, job: Job) -> bool:
        """Wait for a transfer and take note of its end. Returns whether there was a wait."""
        waited = not job.future.done()
        begun = time.perf_counter()
        outcome = job.future.result()
        if waited:
            stalled = self._counters.stall_seconds + time.perf_counter() - begun
            self._counters = replace(self._counters, stall_seconds=stalled)
        self._jobs.remove(job)
        if job.leaving is not None:
            self._note_left(job.leaving, job, outcome.write_error)
        if job.coming is not None:
            if outcome.write_error is not None:
                self._count_buffers(1)
            self._note_come(job.coming, outcome.buffer, outcome.read_error)
        elif outcome.write_error is None:
            self._count_buffers(-1)
        return waited

    def _note_left(self, page: Page, job: Job, error: OSError | None) -> None:
        page.job = None
        if error is not None:
            page.buffer = job.buffer
            self._failure = StorageError(
                f"writing to the {self._tier.describe()} failed: {error}",
                hint="What was under way has been completed in memory, and all state can still "
                "be exported: save it, and continue with directory= on a sound disk.",
            )
            self._failure.__cause__ = error
            return
        if page.dirty:
            paged_out = self._counters.paged_out_bytes + page.num_bytes
            self._counters = replace(self._counters, paged_out_bytes=paged_out)
            page.stored, page.dirty = True, False
        page.filled = False

    def _note_come(self, page: Page, buffer: Tensor, error: OSError | None) -> None:
        page.job = None
        if error is None:
            page.buffer, page.filled = buffer, page.stored
            if page.stored:
                paged_in = self._counters.paged_in_bytes + page.num_bytes
                self._counters = replace(self._counters, paged_in_bytes=paged_in)
            return
        self._count_buffers(-1)
        page.read_failures += 1
        if page.read_failures >= _READ_FAILURES:
            self._lost = StorageError(
                f"a page could not be read back from the {self._tier.describe()}: {error}",
                hint="The state it held is lost; continue from the last checkpoint.",
            )
            self._lost.__cause__ = error

    @property
    def _capacity(self) -> int:
        """Pages the budget has room for. Once writing has failed, nothing can leave."""
        return len(self._pages) if self._failure else self._budget // self._page_bytes

    def _count_buffers(self, change: int) -> None:
        self._num_buffers += change
        peak = max(self._counters.peak_resident_bytes, self._num_buffers * self._page_bytes)
        self._counters = replace(self._counters, peak_resident_bytes=peak)

    def _reserve(self, num_pages: int, budget: int) -> None:
        if num_pages > budget // self._page_bytes:
            self._tier.reserve(num_pages * self._page_bytes)

    def _checked(self, fast_bytes: int) -> int:
        if fast_bytes < MIN_PAGES * self._page_bytes:
            raise UsageError(
                f"fast_bytes: room for {MIN_PAGES} pages of {self._page_bytes} bytes expected, "
                f"found {fast_bytes}",
                hint="Raise fast_bytes, or make the pages smaller with page_bytes=.",
            )
        return fast_bytes


def _close(executor: ThreadPoolExecutor, tier: Tier) -> None:
    executor.shutdown(wait=True)
    tier.close()

"""Pages under a byte budget: the few at work are in fast memory, the rest in a slower tier.

The pool knows items and pages, not what they are for. Its owner *walks* the pages: for each part
of each item it gets views of the values and changes them in place. Meanwhile threads write back
pages that the walk has left and read those it will need.

Each walk goes the other way than the last, so what the last walk left in memory is what the
next needs first, and the page passed longest ago is always the right one to give up: with
a budget of K out of N pages, N - K move in and out a walk, which is the least possible.

Between walks an item can be changed by itself (`update`): what is given up for it is what the next
walk needs last.

A pool may `borrow` memory that others have no use for until the next walk has ended: what is
changed before it then need not be written and read again, and that walk repays as it goes.

Nothing is half-done when storage fails. Room for every page is reserved before a walk begins. A
page that cannot be written stays in memory, over budget, so that the walk still ends; the next
walk then refuses to start, and everything can still be read out. Only a page that cannot be
read back, after retries, is lost; then the pool refuses everything.
"""

import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import RLock

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.memory.buffers import Buffers
from halfbyte.memory.layout import Item, Part, lay_out, page_bytes_for, smallest_page
from halfbyte.memory.stats import PoolStats
from halfbyte.memory.tiers import BLOCK, Tier
from halfbyte.memory.transfers import Page
from halfbyte.memory.walks import Chunk, Stop, Walk, stops_at

MIN_PAGES = 2
"""One at work and one on its way, or two together."""

_IN_FLIGHT = 3  # transfers queued ahead of a walk


class Pool:
    """Items in pages, of which at most `fast_bytes` are in fast memory.

    One thread at a time walks, reads or writes; `set_budget` may be called from any thread.

    Raises:
        UsageError: The budget has no room for two pages.
    """

    def __init__(self, tier: Tier, *, fast_bytes: int, page_bytes: int | None = None) -> None:
        """Begin empty; the budget holds `fast_bytes // page_bytes` pages.

        Args:
            tier: Where pages are.
            fast_bytes: The budget.
            page_bytes: Of a page; by default as `page_bytes_for` the budget.
        """
        page_bytes = page_bytes_for(fast_bytes) if page_bytes is None else page_bytes
        if page_bytes < BLOCK or page_bytes % BLOCK:
            raise UsageError(f"page_bytes: a multiple of {BLOCK} expected, found {page_bytes}")
        self._tier = tier
        self._page_bytes = page_bytes
        self._budget = self._checked(fast_bytes)
        self._loan = 0
        self._items: list[Item] = []
        self._origins: list[int] = []  # by item: the place of its first element among all
        self._pages: list[Page] = []  # in the order of those places
        self._places: list[list[tuple[Page, Part]]] = []  # by item
        self._beside: dict[int, list[tuple[Page, Part]]] = {}  # by item: of what it is paired with
        self._companions: set[int] = set()  # items that are visited beside others
        self._forward = True
        self._walk: Walk | None = None
        self._buffers = Buffers(tier, page_bytes)
        self._lock = RLock()
        self._finalizer = weakref.finalize(self, _close, self._buffers.executor, tier)

    def close(self) -> None:
        """End the threads and give back the slow tier. Also happens with the last reference."""
        self._finalizer()

    @property
    def items(self) -> Sequence[Item]:
        """All items; an item's number is its place."""
        return self._items

    @property
    def resident_bytes(self) -> int:
        """Fast memory held at this moment."""
        return self._buffers.num_bytes

    @property
    def lacking_bytes(self) -> int:
        """What the budget lacks to hold all pages."""
        return max(len(self._pages) - self._owned, 0) * self._page_bytes

    def stats(self) -> PoolStats:
        """The counters, and what is held now."""
        return replace(
            self._buffers.counters,
            fast_bytes=self._budget,
            total_bytes=sum(page.num_bytes for page in self._pages),
            resident_bytes=self._buffers.num_bytes,
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
            for item in items:
                end = self._origins[-1] + self._items[-1].num_elements if self._items else 0
                self._origins.append(end)
                self._items.append(item)
            self._pages += pages
            self._places += [[] for _ in items]
        for page in pages:
            for part in page.parts:
                self._places[part.item].append((page, part))
        return numbers

    def pair(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Let walks over the second item of each pair bring in the first beside it.

        Raises:
            UsageError: Their lengths differ, or the places where they may be cut.
        """
        pairs = list(pairs)
        for first, second in pairs:
            one, other = self._items[first], self._items[second]
            if (one.num_elements, one.granule) != (other.num_elements, other.granule):
                raise UsageError(f"{one.name} and {other.name} differ in length or granule")
        with self._lock:
            for first, second in pairs:
                self._origins[second] = self._origins[first]
                self._beside[second] = self._places[first]
                self._companions.add(first)
            self._pages.sort(
                key=lambda page: self._origins[page.parts[0].item] + page.parts[0].begin
            )

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
        left = self._buffers.num_bytes + self._tier.free_bytes() - num_bytes
        budget = max(min(most, left), MIN_PAGES * self._page_bytes)
        self.set_budget(budget)
        return budget

    def borrow(self, num_bytes: int) -> None:
        """Hold so much above the budget, until the next walk has ended at the latest."""
        with self._lock:
            self._loan = num_bytes
            if self._walk is None and self._buffers.count > self._capacity:
                self._settle()

    def prefetch(self, *, leave: int = 0) -> None:
        """Begin to fill the budget with what the next walk needs first, and return at once.

        Args:
            leave: Bytes of the budget for what will be changed before.
        """
        buffers = self._buffers
        with self._lock:
            if self._walk is not None or buffers.failure or buffers.lost:
                return
            buffers.reap()
            capacity = self._capacity - -(-leave // self._page_bytes)
            for page in self._ordered(self._pages):
                if len(buffers.jobs) >= _IN_FLIGHT or buffers.count >= capacity:
                    break
                if page.stored and page.buffer is None and page.job is None:
                    page.prefetched = True
                    buffers.transfer(None, page)

    def walk(self, items: Collection[int] | None = None, *, spend: bool = False) -> Iterator[Chunk]:
        """Visit the parts of some or all items, page by page, to change them in place.

        The views of a chunk are valid until the next one is asked for. Nobody may rely on the
        order.

        Args:
            items: Their numbers; by default all that stand beside no other.
            spend: What is beside them is not needed any more: it is zero after the walk, and
                pages of it need not be written.

        Raises:
            StorageError: Before the first chunk: storage failed during an earlier walk. Later: a
                page could not be read back, and is lost.
        """
        with self._lock:
            self._buffers.reap()
        self.require_usable()
        wanted = None if items is None else frozenset(items)
        stops = self._stops(self._pages, wanted)
        self._forward = not self._forward
        yield from self._visit(stops, change=True, spend=spend, repay=True)

    def update(self, item: int, *, replace: bool = False) -> Iterator[Chunk]:
        """Visit the parts of one item, to change them in place, out of turn.

        Args:
            item: Its number.
            replace: All of it will be written, so nothing has to be there before.

        Raises:
            StorageError: As `walk`.
        """
        self.require_usable()
        return self._visit(self._stops_alone(item), change=True, replace=replace)

    def read(self, item: int) -> tuple[Tensor, ...]:
        """A copy of an item's fields, each flat.

        Raises:
            StorageError: A page was lost.
        """
        found = self._items[item]
        copies: list[Tensor] = []
        for chunk in self._visit(self._stops_alone(item), change=False):
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
        found = self._items[item]
        for chunk in self.update(item, replace=True):
            for each, new, value in zip(found.fields, values, chunk.values, strict=True):
                start = chunk.begin // each.elements
                value.copy_(new.reshape(-1)[start : start + value.numel()])

    def forget(self, items: Collection[int]) -> None:
        """Let the content of items go: their pages are neither written nor read again for it.

        Pages that hold other items as well keep everything; elsewhere the items are zero.
        """
        with self._lock:
            for page in {page for item in items for page, _ in self._places[item]}:
                if all(part.item in items for part in page.parts):
                    page.forget()

    def require_usable(self) -> None:
        """Raise what made storage fail, if it did.

        Raises:
            StorageError: It did; `read` still works unless a page was lost.
        """
        if error := self._buffers.lost or self._buffers.failure:
            raise error

    # A walk: `_arrive` at each page, leave it, look ahead in between.

    def _visit(
        self,
        stops: Sequence[Stop],
        *,
        change: bool,
        spend: bool = False,
        repay: bool = False,
        replace: bool = False,
    ) -> Iterator[Chunk]:
        if self._buffers.lost:
            raise self._buffers.lost
        with self._lock:
            self._buffers.reap()
            pages = list(self._ordered(self._pages))
            self._walk = walk = Walk(stops, pages, repays=repay, replaces=replace)
        last_uses = walk.last_uses()
        try:
            for number, stop in enumerate(stops):
                with self._lock:
                    self._bring(walk, stop, change=change)
                yield from stop.chunks(self._items)
                with self._lock:
                    fence = self._tier.fence()
                    for place, page in enumerate(stop.pages):
                        page.fence = fence
                        if last_uses[page] == number:
                            walk.pinned = tuple(p for p in walk.pinned if p is not page)
                            if spend and place:
                                page.forget()
                                walk.passed.appendleft(page)
                            else:
                                walk.passed.append(page)
        finally:
            with self._lock:
                self._walk = None
                if repay:
                    self._loan = 0
                if self._buffers.count > self._capacity:
                    self._settle()

    def _bring(self, walk: Walk, stop: Stop, *, change: bool) -> None:
        """Have all pages of a stop in fast memory; the following ones are on their way."""
        kept = tuple(page for page in stop.pages if page in walk.pinned)
        walk.pinned = kept
        for page in stop.pages:
            if page not in kept:
                walk.at += 1
                self._arrive(walk, page)
                walk.pinned = (*walk.pinned, page)
            page.dirty |= change
        self._shrink(walk)
        self._look_ahead(walk)
        self._repay(walk)

    def _arrive(self, walk: Walk, page: Page) -> None:
        self._buffers.reap()
        waited = page.buffer is None and self._fetch(walk, page)
        if not page.filled:
            if not walk.replaces or len(page.parts) > 1:
                page.ready.zero_()
            page.filled = True
        self._buffers.note_arrival(page, waited=waited)

    def _fetch(self, walk: Walk, page: Page) -> bool:
        """Bring a page in. Returns whether it had to be waited for."""
        buffers = self._buffers
        waited = False
        while page.buffer is None:
            if buffers.lost:
                raise buffers.lost
            if page.job is not None:
                waited |= buffers.finish(page.job)
            elif not self._request(walk, page, urgent=True):
                # Every buffer is on its way: the oldest transfer brings one.
                waited |= buffers.finish(buffers.jobs[0])
        return waited

    def _look_ahead(self, walk: Walk) -> None:
        walk.ahead = max(walk.ahead, walk.at + 1)
        while walk.ahead < len(walk.order) and len(self._buffers.jobs) < _IN_FLIGHT:
            page = walk.order[walk.ahead]
            if page.buffer is None and page.job is None:
                if not self._request(walk, page, urgent=False):
                    return
                page.prefetched = page.stored
            elif page.job is not None and page.job.leaving is page:
                return
            walk.ahead += 1

    def _request(self, walk: Walk, page: Page, *, urgent: bool) -> bool:
        """Begin to bring a page in, if there is a buffer for it."""
        buffers = self._buffers
        if buffers.count < (self._owned if walk.repays else self._capacity):
            buffers.transfer(None, page)
            return True
        full = buffers.count >= self._capacity
        victim = walk.victim(urgent=urgent and full)
        if victim is None and full:
            return False
        buffers.transfer(victim, page)
        return True

    def _repay(self, walk: Walk) -> None:
        """Let go of what is on loan and was passed, while nothing else has to move."""
        buffers = self._buffers
        while walk.repays and buffers.count - buffers.num_leaving > self._owned:
            if len(buffers.jobs) >= _IN_FLIGHT:
                return
            victim = walk.victim(urgent=False)
            if victim is None:
                return
            buffers.transfer(victim, None)

    def _shrink(self, walk: Walk) -> None:
        """During a walk: bring the buffers down to a budget that became smaller."""
        buffers = self._buffers
        while buffers.count - buffers.num_leaving > self._capacity:
            victim = walk.victim(urgent=True)
            if victim is not None:
                buffers.transfer(victim, None)
            elif buffers.jobs:
                buffers.finish(buffers.jobs[0])
            else:
                break
        while buffers.count > self._capacity and buffers.jobs:
            buffers.finish(buffers.jobs[0])

    def _settle(self) -> None:
        """Outside a walk: end all transfers, then give back what is above the budget."""
        buffers = self._buffers
        buffers.finish_all()
        needed_last_first = reversed(list(self._ordered(self._pages)))
        for page in needed_last_first:
            if buffers.count <= self._capacity:
                break
            if page.buffer is not None:
                buffers.transfer(page, None)
            while len(buffers.jobs) >= _IN_FLIGHT:
                buffers.finish(buffers.jobs[0])
            if buffers.count - len(buffers.jobs) <= self._capacity:
                break
        buffers.finish_all()

    def _stops(self, pages: Sequence[Page], wanted: Collection[int] | None) -> list[Stop]:
        if wanted is None:
            wanted = frozenset(range(len(self._items))) - self._companions
        return [
            stop
            for page in self._ordered(pages)
            for stop in stops_at(page, wanted=wanted, beside=self._beside, forward=self._forward)
        ]

    def _stops_alone(self, item: int) -> list[Stop]:
        return [
            stop
            for page, _ in self._places[item]
            for stop in stops_at(page, wanted={item}, beside={}, forward=True)
        ]

    def _ordered(self, pages: Sequence[Page]) -> Iterator[Page]:
        return iter(pages) if self._forward else reversed(pages)

    @property
    def _owned(self) -> int:
        """Pages the budget has room for. Once writing has failed, nothing can leave."""
        return len(self._pages) if self._buffers.failure else self._budget // self._page_bytes

    @property
    def _capacity(self) -> int:
        """Those, and what is on loan."""
        return self._owned + self._loan // self._page_bytes

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

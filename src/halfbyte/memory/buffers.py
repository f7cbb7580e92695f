"""The fast buffers of a pool: how many there are, what moves in and out of them, what failed."""

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from halfbyte.errors import StorageError
from halfbyte.memory.stats import PoolStats
from halfbyte.memory.tiers import Tier
from halfbyte.memory.transfers import Job, Page, start

_THREADS = 2  # so that a read need not wait for a write
_READ_FAILURES = 2  # a failed prefetch is tried once more when the page is needed


class Buffers:
    """Buffers of one size, and the transfers between them and the slow tier.

    Transfers run on threads, but begin (`transfer`) and end (`finish`) on the owner's.

    Attributes:
        page_bytes: Of each buffer.
        count: Buffers there are, those of transfers under way included.
        jobs: Transfers under way, the oldest first.
        counters: What was moved, and how often it was waited for.
        failure: Why a page could not be written. It is in its buffer; nothing can leave any more.
        lost: Why a page could not be read back.
    """

    def __init__(self, tier: Tier, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.count = 0
        self.jobs: deque[Job] = deque()
        self.counters = PoolStats()
        self.failure: StorageError | None = None
        self.lost: StorageError | None = None
        self._tier = tier
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="pool")

    @property
    def executor(self) -> ThreadPoolExecutor:
        """The threads, to be shut down by the owner."""
        return self._executor

    @property
    def num_bytes(self) -> int:
        """Of all buffers."""
        return self.count * self.page_bytes

    @property
    def num_leaving(self) -> int:
        """Transfers under way that give a buffer back."""
        return sum(job.frees for job in self.jobs)

    def transfer(self, leaving: Page | None, coming: Page | None) -> None:
        """Let one page take the place of another."""
        if leaving is None:
            buffer = self._tier.buffer(self.page_bytes)
            self._change_count(1)
        else:
            buffer = leaving.ready
            leaving.buffer = None
        job = start(self._executor, self._tier, leaving, coming, buffer)
        for page in (leaving, coming):
            if page is not None:
                page.job = job
        self.jobs.append(job)
        if job.future.done():
            self.finish(job)

    def reap(self) -> None:
        """Take note of the transfers that have ended."""
        for job in [job for job in self.jobs if job.future.done()]:
            self.finish(job)

    def finish_all(self) -> None:
        """Wait for all transfers."""
        while self.jobs:
            self.finish(self.jobs[0])

    def finish(self, job: Job) -> bool:
        """Wait for a transfer and take note of its end. Returns whether there was a wait."""
        waited = not job.future.done()
        begun = time.perf_counter()
        outcome = job.future.result()
        if waited:
            stalled = self.counters.stall_seconds + time.perf_counter() - begun
            self.counters = replace(self.counters, stall_seconds=stalled)
        self.jobs.remove(job)
        if job.leaving is not None:
            self._note_left(job.leaving, job, outcome.write_error)
        if job.coming is not None:
            if outcome.write_error is not None:
                self._change_count(1)
            job.coming.job = None
            if outcome.read_error is None:
                self._note_come(job.coming)
                job.coming.buffer = outcome.buffer
            else:
                self._note_missing(job.coming, outcome.read_error)
        elif outcome.write_error is None:
            self._change_count(-1)
        return waited

    def note_arrival(self, page: Page, *, waited: bool) -> None:
        """Count a page that the owner came to."""
        counters = self.counters
        if waited:
            self.counters = replace(counters, misses=counters.misses + 1)
        elif page.prefetched:
            self.counters = replace(counters, prefetched=counters.prefetched + 1)
        else:
            self.counters = replace(counters, hits=counters.hits + 1)
        page.prefetched = False

    def _note_left(self, page: Page, job: Job, error: OSError | None) -> None:
        page.job = None
        if error is not None:
            page.buffer = job.buffer
            self.failure = StorageError(
                f"writing to the {self._tier.describe()} failed: {error}",
                hint="What was under way has been completed in memory, and all state can still "
                "be exported: save it, and continue with directory= on a sound disk.",
            )
            self.failure.__cause__ = error
            return
        if page.dirty:
            paged_out = self.counters.paged_out_bytes + page.num_bytes
            self.counters = replace(self.counters, paged_out_bytes=paged_out)
            page.stored, page.dirty = True, False
        page.filled = False

    def _note_come(self, page: Page) -> None:
        page.filled = page.stored
        if page.stored:
            paged_in = self.counters.paged_in_bytes + page.num_bytes
            self.counters = replace(self.counters, paged_in_bytes=paged_in)

    def _note_missing(self, page: Page, error: OSError) -> None:
        self._change_count(-1)
        page.read_failures += 1
        if page.read_failures >= _READ_FAILURES:
            self.lost = StorageError(
                f"a page could not be read back from the {self._tier.describe()}: {error}",
                hint="The state it held is lost; continue from the last checkpoint.",
            )
            self.lost.__cause__ = error

    def _change_count(self, change: int) -> None:
        self.count += change
        peak = max(self.counters.peak_resident_bytes, self.num_bytes)
        self.counters = replace(self.counters, peak_resident_bytes=peak)

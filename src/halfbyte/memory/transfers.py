"""Moving pages between a buffer and the slow tier, on threads."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from halfbyte.memory.layout import Part
from halfbyte.memory.tiers import Tier

ATTEMPTS = 3
"""A transfer is tried so often before it counts as failed."""


@dataclass(slots=True, eq=False)
class Page:
    """Bytes that move together.

    Attributes:
        parts: What is in it.
        position: Its place in the slow tier.
        num_bytes: How much of it is in use, and is moved.
        buffer: Where it is in the fast tier, if it is.
        job: The transfer under way, in or out.
        stored: The slow tier has, or will have, its content; otherwise it is all zero.
        filled: The buffer holds the content, not what another page left there.
        dirty: The buffer has changed since it was stored.
        prefetched: It was asked for before it was needed.
        read_failures: How many transfers in failed.
        fence: The work that last used the buffer.
    """

    parts: list[Part]
    position: int
    num_bytes: int
    buffer: Tensor | None = None
    job: "Job | None" = None
    stored: bool = False
    filled: bool = False
    dirty: bool = False
    prefetched: bool = False
    read_failures: int = 0
    fence: object = None

    @property
    def ready(self) -> Tensor:
        """The buffer of a page that has one."""
        assert self.buffer is not None, "the page is not in fast memory"  # noqa: S101
        return self.buffer

    def forget(self) -> None:
        """Let the content go: it need not be written, and is zero when next looked at."""
        self.stored = self.filled = self.dirty = False


@dataclass(slots=True)
class Outcome:
    """How a transfer ended.

    Attributes:
        buffer: Where the coming page is.
        write_error: The leaving page is still in the job's buffer, because of this.
        read_error: The coming page is not there, because of this.
    """

    buffer: Tensor
    write_error: OSError | None = None
    read_error: OSError | None = None


@dataclass(slots=True, eq=False)
class Job:
    """Write one page from a buffer, then read another into it. Either may be missing."""

    leaving: Page | None
    coming: Page | None
    buffer: Tensor
    future: "Future[Outcome]"

    @property
    def frees(self) -> bool:
        """Whether the buffer will be given back."""
        return self.coming is None


def start(
    executor: ThreadPoolExecutor,
    tier: Tier,
    leaving: Page | None,
    coming: Page | None,
    buffer: Tensor,
) -> Job:
    """Begin a transfer; one that moves no bytes is over at once."""
    store = leaving if leaving is not None and leaving.dirty else None
    load = coming if coming is not None and coming.stored else None
    fence = None if leaving is None else leaving.fence
    future: Future[Outcome] = Future()
    if store is None and load is None:
        future.set_result(Outcome(buffer))
    else:
        needs_buffer = coming is not None
        future = executor.submit(_move, tier, buffer, fence, store, load, needs_buffer)
    return Job(leaving, coming, buffer, future)


def _move(
    tier: Tier,
    buffer: Tensor,
    fence: object,
    store: Page | None,
    load: Page | None,
    needs_buffer: bool,  # noqa: FBT001  (positional through the executor)
) -> Outcome:
    outcome = Outcome(buffer)
    if store is not None:
        data = buffer[: store.num_bytes]
        outcome.write_error = _attempt(lambda: tier.write(store.position, data, fence))
        if outcome.write_error is not None and needs_buffer:
            outcome.buffer = tier.buffer(buffer.numel())
    if load is not None:
        into = outcome.buffer[: load.num_bytes]
        outcome.read_error = _attempt(lambda: tier.read(load.position, into, fence))
    return outcome


def _attempt(transfer: Callable[[], None]) -> OSError | None:
    """Try a transfer a few times: a passing fault of a disk or a network need not end a run."""
    last = None
    for _ in range(ATTEMPTS):
        try:
            transfer()
        except OSError as error:
            last = error
        else:
            return None
    return last

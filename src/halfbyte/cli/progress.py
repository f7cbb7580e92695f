"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Advance = Callable[[float], None]
"""Call with the amount of work done since the last call."""

LINE_EVERY_SECONDS = 10.0


@contextlib.contextmanager
def show_progress(description: str, total: float) -> Iterator[Advance]:
    """Show on stderr how much of `total` is done.

    Args:
        description: What is being done: `quantizing`.
        total: In any unit; positive.
    """
    if sys.stderr.isatty():
        with _bar(description, total) as advance:
            yield advance
    else:
        yield _lines(description, total)


@contextlib.contextmanager
def _bar(description: str, total: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)


def _lines(description: str, total: float) -> Advance:
    done = 0.0
    last = time.monotonic()

    def advance(amount: float) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= LINE_EVERY_SECONDS:
            last = now
            print(f"{description}: {done / total:.0%}", file=sys.stderr, flush=True)  # noqa: T201

    return advance

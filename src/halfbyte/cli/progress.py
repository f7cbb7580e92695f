"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from halfbyte.cli.output import format_bytes

Advance = Callable[[float], None]
"""Call with the amount of work done since the last call."""

LINE_EVERY_SECONDS = 10.0


@contextlib.contextmanager
def show_progress(description: str, total: float, *, in_bytes: bool = False) -> Iterator[Advance]:
    """Show on stderr how much of `total` is done, and the time left.

    Args:
        description: What is being done: `quantizing`.
        total: In any unit; positive.
        in_bytes: The unit is bytes: show how many.
    """
    if sys.stderr.isatty():
        with _bar(description, total, in_bytes=in_bytes) as advance:
            yield advance
    else:
        yield _lines(description, total, in_bytes=in_bytes)


@contextlib.contextmanager
def _bar(description: str, total: float, *, in_bytes: bool) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    columns = list(Progress.get_default_columns())
    if in_bytes:
        columns[-1:-1] = [DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)


def _lines(description: str, total: float, *, in_bytes: bool) -> Advance:
    done = 0.0
    start = last = time.monotonic()

    def advance(amount: float) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= LINE_EVERY_SECONDS:
            last = now
            size = f", {format_bytes(done)} of {format_bytes(total)}" if in_bytes else ""
            left = (now - start) * (total / done - 1) if done else 0.0
            line = f"{description}: {done / total:.0%}{size}, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)  # noqa: T201

    return advance

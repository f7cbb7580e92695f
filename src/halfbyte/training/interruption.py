"""SIGINT and SIGTERM: the first asks the run to save and stop, the second ends it at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class StopRequest:
    """Whether the run was asked to stop; looked at between micro-batches."""

    signal_number: int | None = None

    @property
    def pending(self) -> bool:
        """Whether a signal has come."""
        return self.signal_number is not None


@contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one raises KeyboardInterrupt.

    The handlers that were there before come back at the end. Outside the main thread, where
    Python allows no handlers, the request simply never comes.
    """
    request = StopRequest()

    def handle(number: int, _frame: FrameType | None) -> None:
        if request.pending:
            raise KeyboardInterrupt
        request.signal_number = number

    try:
        previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    except ValueError:  # not the main thread
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

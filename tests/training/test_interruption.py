"""Signals ask first and end second."""

import os
import signal
import threading

import pytest

from halfbyte.training.interruption import StopRequest, listen_for_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with listen_for_stop() as request:
        assert not request.pending
        os.kill(os.getpid(), number)
        assert request.pending
        assert request.signal_number == number
    assert signal.getsignal(number) is before


def test_the_second_signal_ends() -> None:
    def signal_twice() -> None:
        with listen_for_stop():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        signal_twice()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_run_without_it() -> None:
    seen: list[StopRequest] = []

    def run() -> None:
        with listen_for_stop() as request:
            seen.append(request)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [request.pending for request in seen] == [False]

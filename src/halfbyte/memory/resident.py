"""What of this process is in memory, as the kernel counts it.

Two figures are used throughout: the *peak* is VmHWM, the most that was ever resident, mapped
files included; *private* bytes are RssAnon + RssShmem, which nothing but this process's exit or
swap can take back. Mapped weights count in the first only: the kernel may drop their pages at
any time.

The kernel counts pages in batches a thread, so each figure may be off by a few hundred KB.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from halfbyte.errors import UnsupportedError

PROC = Path("/proc")
_RESET_PEAK = b"5"  # proc(5), clear_refs: "reset the peak resident set size to the current value"
_STATUS_BYTES = 8192  # a status file is about 1.5 KB; a cut one is refused


@dataclass(frozen=True, slots=True)
class Resident:
    """Resident bytes of one process at one moment.

    Attributes:
        anonymous: RssAnon, the heap and other private pages.
        file: RssFile, pages of mapped files, which the kernel may drop.
        shared: RssShmem, shared memory and tmpfs.
        peak: VmHWM, the largest total so far, or since `reset_peak`.
    """

    anonymous: int
    file: int
    shared: int
    peak: int

    @property
    def total(self) -> int:
        """VmRSS: everything resident."""
        return self.anonymous + self.file + self.shared

    @property
    def private(self) -> int:
        """RssAnon + RssShmem: what only this process can give back."""
        return self.anonymous + self.shared


def resident(*, proc: Path = PROC) -> Resident:
    """Resident bytes of this process.

    Raises:
        UnsupportedError: There is no Linux `/proc` here, or it lacks a figure.
    """
    path = proc / "self" / "status"
    try:
        return _parse(path.read_bytes(), path)
    except OSError as error:
        raise _no_proc(path) from error


def peak_bytes() -> int:
    """VmHWM: the most that was resident at once, in bytes."""
    return resident().peak


def private_bytes() -> int:
    """RssAnon + RssShmem, in bytes."""
    return resident().private


def reset_peak(*, proc: Path = PROC) -> bool:
    """Let the peak start again from what is resident.

    Returns:
        Whether the kernel did it; containers often forbid it, and then peaks only ever grow.
    """
    try:
        (proc / "self" / "clear_refs").write_bytes(_RESET_PEAK)
    except OSError:
        return False
    return True


class PeakSampler:
    """Watches private bytes from a thread; the kernel keeps no peak of them.

    A sample takes some 20 microseconds. A rise and fall between two samples goes unseen.

        with PeakSampler() as sampler:
            ...
        sampler.peak

    Raises:
        UnsupportedError: As `resident`, when built.
    """

    def __init__(
        self,
        *,
        aside: Callable[[], int] = int,
        interval: float = 0.01,
        proc: Path = PROC,
    ) -> None:
        """Prepare.

        Args:
            aside: Bytes that the second peak leaves out; asked for at every sample.
            interval: Between samples, in seconds.
            proc: Where proc(5) is mounted.
        """
        self._aside = aside
        self._peak_besides = 0
        self._proc = proc
        self._path = proc / "self" / "status"
        self._interval = interval
        self._peak = resident(proc=proc).private
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def peak(self) -> int:
        """Most private bytes seen so far, in bytes."""
        return self._peak

    @property
    def peak_besides(self) -> int:
        """Most private bytes that were not `aside`, since `reset_besides`."""
        return self._peak_besides

    def start(self) -> None:
        """Begin sampling; does nothing when it is running."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="peak-sampler", daemon=True)
            self._thread.start()

    def stop(self) -> int:
        """Take a last sample, end the thread, and return the peak. May be called twice."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        return self._peak

    def reset(self) -> None:
        """Let the peak start again from the next sample."""
        self._peak = 0

    def reset_besides(self) -> int:
        """Let the second peak start again from what is there, and return that."""
        self._peak_besides = resident(proc=self._proc).private - self._aside()
        return self._peak_besides

    def _run(self) -> None:
        # One descriptor, read from its start, makes the kernel write the figures anew.
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            last = False
            while not last:
                last = self._stop.wait(self._interval)
                sample = _parse(os.pread(descriptor, _STATUS_BYTES, 0), self._path)
                self._peak = max(self._peak, sample.private)
                self._peak_besides = max(self._peak_besides, sample.private - self._aside())
        finally:
            os.close(descriptor)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def kilobyte_lines(text: str) -> dict[str, int]:
    """The figures of lines such as `VmHWM:   1756 kB`, in bytes; other lines are left out."""
    figures = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        match rest.split():
            case [number, "kB"] if number.isdigit():
                figures[name] = int(number) * 1024
    return figures


def _parse(status: bytes, path: Path) -> Resident:
    figures = kilobyte_lines(status.decode(errors="replace"))
    wanted = ("RssAnon", "RssFile", "RssShmem", "VmHWM")
    if missing := [name for name in wanted if name not in figures]:
        raise UnsupportedError(
            f"{path} does not say how much memory is in use",
            problems=[f"{name}: a line `{name}: N kB` expected, none found" for name in missing],
            hint="Linux 4.5 or newer is needed to account for memory.",
        )
    anonymous, file, shared, peak = (figures[name] for name in wanted)
    # The counters move apart by a few pages; a peak below what is there would be absurd.
    return Resident(anonymous, file, shared, max(peak, anonymous + file + shared))


def _no_proc(path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"memory in use is unknown: {path} cannot be read",
        hint="It is a file of Linux; accounting for memory needs Linux with /proc mounted.",
    )

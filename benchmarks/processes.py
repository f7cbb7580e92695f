"""A process of its own, and the most memory that it took."""

import subprocess
import sys
from dataclasses import dataclass

# A process inherits the peak of the one that starts it; this one is small.
_LAUNCHER = """
import os, subprocess, sys
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:]).pid, 0)
print()  # what it printed may end amid a line
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)
"""


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that ended.

    Attributes:
        lines: What it printed, without empty ones.
        peak: Its largest resident set, in bytes.
    """

    lines: tuple[str, ...]
    peak: int


def run_alone(*command: str) -> Finished:
    """Start a process and wait for it.

    Raises:
        RuntimeError: It failed; the last of what it wrote to stderr is in the message.
    """
    launcher = [sys.executable, "-c", _LAUNCHER, *command]
    done = subprocess.run(launcher, capture_output=True, text=True, check=True)  # noqa: S603
    *lines, last = done.stdout.splitlines()
    code, peak = map(int, last.split())
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}: {done.stderr[-2000:]}")
    return Finished(tuple(line for line in lines if line), peak)

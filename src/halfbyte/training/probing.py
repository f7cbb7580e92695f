"""Starting a probe and reading its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

from halfbyte.errors import DoesNotFitError, HalfbyteError
from halfbyte.training.probe_report import ProbeReport, ProbeRequest


def run_probe(request: ProbeRequest) -> ProbeReport:
    """Run `halfbyte.training.probe` in a new process.

    Raises:
        DoesNotFitError: Even the probe's steps need more memory than the machine has left.
        HalfbyteError: The probe failed; its last words are in the message.
    """
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte.training.probe"],
        input=request.to_json(),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise HalfbyteError(f"memory cannot be measured: {last[0]}")
    answer = json.loads(lines[-1])
    if answer.get("out_of_memory"):
        raise DoesNotFitError(
            "the memory that is left is not enough for a few steps of "
            f"{max(shape.num_tokens for shape in request.shapes)} tokens",
            hint="`halfbyte doctor` shows how much there is.",
        )
    if "error" in answer:
        raise HalfbyteError(f"memory cannot be measured: {answer['error']}")
    return ProbeReport.from_json(answer)


def nearest_directory(path: Path) -> Path:
    """The path itself, or the first above it that exists."""
    while not path.is_dir():
        path = path.parent
    return path

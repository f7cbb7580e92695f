"""`metrics.jsonl` and its kin: records of a run, each written exactly once over all resumes.

`metrics.jsonl` has one record a step and one an evaluation.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from halfbyte.errors import FormatError

METRICS_FILE = "metrics.jsonl"

MEASURED_FIELDS = frozenset(
    {
        "seconds",
        "tokens_per_second",
        "peak_bytes",
        "peak_private_bytes",
        "paging",
        "eval_seconds",
    }
)
"""Fields that differ between runs of the same configuration; all others are reproducible."""


class RecordFile:
    """Appends records to a file of lines.

    A record is handed to the operating system before `append` returns, so it survives the
    death of the process; `sync` makes it survive the machine's.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        """Open for appending after step `resume_step`; what was recorded later is removed."""
        self.path = path
        kept = [r for r in read_records(self.path) if _step(r) <= resume_step]
        replacement = self.path.with_suffix(".jsonl.new")
        with replacement.open("w") as stream:
            stream.writelines(_line(record) for record in kept)
            stream.flush()
            os.fsync(stream.fileno())
        replacement.replace(self.path)
        self._stream = self.path.open("a")

    def append(self, record: Mapping[str, object]) -> None:
        """Write one record; it needs a `step`."""
        self._stream.write(_line(record))
        self._stream.flush()

    def sync(self) -> None:
        """Force the records to the disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._stream.close()


def read_records(path: Path) -> Iterator[dict[str, object]]:
    """The records of a file, oldest first; none where there is no file.

    A last line without its end, left by a process that died in writing it, is passed over.

    Raises:
        FormatError: Another line is not a JSON object with a step.
    """
    if not path.exists():
        return
    with path.open() as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
                _step(record)
            except (ValueError, KeyError, TypeError) as error:
                raise FormatError(f"{path}:{number}: a JSON object with a step expected") from error
            yield record


def _step(record: Mapping[str, object]) -> int:
    step = record["step"]
    if not isinstance(step, int):
        raise TypeError(step)
    return step


def _line(record: Mapping[str, object]) -> str:
    return json.dumps(record) + "\n"

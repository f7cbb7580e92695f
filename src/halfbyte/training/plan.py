"""What a run will take, as a value, and as `plan.json` in the run directory."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.errors import FormatError, MissingFileError
from halfbyte.storage.atomic import write_file
from halfbyte.storage.json_file import read_json_object

PLAN_FILE = "plan.json"

Json = None | int | float | str | Mapping[str, "Json"]
"""What a plan is made of, as a file holds it."""


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """What a run writes, in bytes.

    Attributes:
        checkpoints: Those that are kept and the one that is written before the oldest goes.
        result: The adapter or the model.
        paged: The file of a paged optimizer.
        free: On the disk of the run directory.
    """

    checkpoints: int
    result: int
    paged: int
    free: int

    @property
    def total(self) -> int:
        """All together."""
        return self.checkpoints + self.result + self.paged


@dataclass(frozen=True, slots=True)
class Largest:
    """The most that still fits when everything else stays; None where there is no such limit.

    Attributes:
        micro_batch_tokens: Also the longest document, since none is split. 0 if nothing fits.
        rank: Of the adapter; an estimate. None for the method `full`.
    """

    micro_batch_tokens: int
    rank: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A prediction, in bytes and seconds.

    Attributes:
        peak_bytes: VmHWM of the whole run: measured <= predicted <= measured + max(5 %, 30 MB).
        parts: What the peak consists of, by name; their sum is the peak.
        limit_bytes: What it must stay within.
        limit_from: `memory.budget`, or what limits the memory that is left.
        micro_batch_tokens: The setting.
        largest_micro_batch: Tokens of the largest one that the data makes.
        recompute: Layers that compute their activations again.
        num_layers: Of the model.
        num_steps: Of the run.
        seconds_per_step: On average, while nothing else is running.
        disk: What is written.
        largest: The most that fits.
        probe_seconds: What measuring took.
    """

    peak_bytes: int
    parts: Mapping[str, int]
    limit_bytes: int
    limit_from: str
    micro_batch_tokens: int
    largest_micro_batch: int
    recompute: int
    num_layers: int
    num_steps: int
    seconds_per_step: float
    disk: DiskNeed
    largest: Largest
    probe_seconds: float

    @property
    def fits(self) -> bool:
        """Whether memory and disk are enough."""
        return self.peak_bytes <= self.limit_bytes and self.disk.total <= self.disk.free

    @property
    def seconds(self) -> float:
        """All steps together, evaluations left out."""
        return self.num_steps * self.seconds_per_step

    def record(self) -> dict[str, Json]:
        """As plain JSON."""
        disk = {**asdict(self.disk), "total": self.disk.total}
        return {**asdict(self), "disk": disk, "fits": self.fits, "seconds": self.seconds}

    def write(self, run_directory: Path) -> None:
        """Write `plan.json`."""
        content = json.dumps(self.record(), indent=2) + "\n"
        write_file(run_directory / PLAN_FILE, content.encode())


def planned_peak(run_directory: Path) -> int | None:
    """`peak_bytes` of the plan in a run directory; None when the run was not planned.

    Raises:
        FormatError: The file is not a plan.
    """
    path = run_directory / PLAN_FILE
    try:
        peak = read_json_object(path).get("peak_bytes")
    except MissingFileError:
        return None
    if type(peak) is not int:
        raise FormatError(f"{path}: peak_bytes: a number expected, found {peak!r}")
    return peak

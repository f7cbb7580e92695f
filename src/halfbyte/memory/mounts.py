"""What is mounted where, from `/proc/self/mountinfo`."""

import re
from dataclasses import dataclass
from pathlib import Path

from halfbyte.memory.resident import PROC

RAM_FILESYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
"""Files there are memory: they shrink nothing."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo.

    Attributes:
        point: The directory it is seen at.
        root: What part of the filesystem, or of the control group hierarchy, is seen there.
        kind: Type of the filesystem.
        options: Of the filesystem itself; for a version 1 control group, its controllers.
    """

    point: Path
    root: str
    kind: str
    options: tuple[str, ...]


def read_mounts(*, proc: Path = PROC) -> list[Mount]:
    """All mounts this process sees, in the order they were made; none without `/proc`."""
    try:
        lines = (proc / "self" / "mountinfo").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        # proc(5): fields 4 and 5 are the root and the mount point; after the dash come the
        # type, the source and the options.
        before, _, after = line.partition(" - ")
        match before.split(), after.split():
            case [_, _, _, root, point, *_], [kind, _, options, *_]:
                mount = Mount(
                    Path(_unescape(point)), _unescape(root), kind, tuple(options.split(","))
                )
                found.append(mount)
    return found


def filesystem_of(path: Path, *, proc: Path = PROC) -> str | None:
    """Type of the filesystem that holds an existing path; None where that cannot be told."""
    real = path.resolve()
    best: Mount | None = None
    for mount in read_mounts(proc=proc):
        inside = real.is_relative_to(mount.point)
        # Of two mounts on one directory, the later covers the earlier.
        if inside and (best is None or len(mount.point.parts) >= len(best.point.parts)):
            best = mount
    return None if best is None else best.kind


def _unescape(field: str) -> str:
    """Decode the octal that stands for spaces and the like."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)

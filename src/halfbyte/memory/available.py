"""How much memory this process may still take, and what sets that limit.

The smallest of: what the machine has left, what each control group above us has left (versions
1 and 2, where page cache that can be dropped counts as free), and the process's own resource
limits. The answer carries its reason, so that a plan can say why something does not fit.
"""

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import UnsupportedError
from halfbyte.memory.mounts import Mount, read_mounts
from halfbyte.memory.resident import PROC, kilobyte_lines

_UNLIMITED = 2**60  # version 1 writes "no limit" as a number near 2^63
_FILES = {
    # limit, usage, and the line of memory.stat that counts droppable page cache
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "cgroup2": ("memory.max", "memory.current", "inactive_file"),
}


@dataclass(frozen=True, slots=True)
class Available:
    """Memory that can still be taken.

    Attributes:
        bytes: How much.
        limit: The whole of which that is left, in bytes.
        because: What sets the limit: "the machine", a control group's directory, or the name of
            a resource limit.
    """

    bytes: int
    limit: int
    because: str


def available_memory(*, proc: Path = PROC) -> Available:
    """The tightest of all limits on this process.

    Raises:
        UnsupportedError: There is no Linux `/proc` here.
    """
    return min(limits(proc=proc), key=lambda limit: limit.bytes)


def limits(*, proc: Path = PROC) -> list[Available]:
    """Every limit that applies, the machine's first.

    Raises:
        UnsupportedError: There is no Linux `/proc` here.
    """
    return [_machine(proc), *_control_groups(proc), *_resource_limits(proc)]


def _machine(proc: Path) -> Available:
    path = proc / "meminfo"
    try:
        figures = kilobyte_lines(path.read_text())
        return Available(figures["MemAvailable"], figures["MemTotal"], "the machine")
    except (OSError, KeyError) as error:
        raise UnsupportedError(
            f"available memory is unknown: {path} has no MemAvailable and MemTotal",
            hint="It is a file of Linux; planning needs Linux with /proc mounted.",
        ) from error


def _resource_limits(proc: Path) -> Iterator[Available]:
    try:
        figures = kilobyte_lines((proc / "self" / "status").read_text())
    except OSError:
        return
    for name, counter in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY and counter in figures:
            yield Available(max(limit - figures[counter], 0), limit, name)


def _control_groups(proc: Path) -> Iterator[Available]:
    """Limits of our control group and all groups above it, as far as they can be seen."""
    for kind, mount, directory in _memory_groups(proc):
        limit_file, usage_file, cache_line = _FILES[kind]
        while True:
            limit = _number(directory / limit_file)
            usage = _number(directory / usage_file)
            if limit is not None and limit < _UNLIMITED and usage is not None:
                cache = min(_stat(directory / "memory.stat", cache_line), usage)
                yield Available(max(limit - usage + cache, 0), limit, str(directory))
            if directory == mount:
                break
            directory = directory.parent  # noqa: PLW2901  (a walk upwards)


def _memory_groups(proc: Path) -> Iterator[tuple[str, Path, Path]]:
    """Kind, mount point and our own directory of every hierarchy that can limit memory."""
    try:
        membership = (proc / "self" / "cgroup").read_text()
    except OSError:
        return
    ours: dict[str, str] = {}  # kind -> our group's path within the hierarchy
    for line in membership.splitlines():
        hierarchy, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not path.startswith("/"):
            continue
        if hierarchy == "0" and not controllers:
            ours["cgroup2"] = path
        elif "memory" in controllers.split(","):
            ours["cgroup"] = path
    for mount in read_mounts(proc=proc):
        if mount.kind in ours and (mount.kind == "cgroup2" or "memory" in mount.options):
            yield mount.kind, mount.point, _beneath(mount, ours[mount.kind])


def _beneath(mount: Mount, path: str) -> Path:
    """Our group's directory.

    In a container the path may not lie in the part of the hierarchy that is mounted (it is told
    from outside); then what is mounted is the container's own group.
    """
    relative = os.path.relpath(path, mount.root)
    if relative == "." or relative.startswith(".."):
        return mount.point
    directory = mount.point / relative
    return directory if directory.is_dir() else mount.point


def _number(path: Path) -> int | None:
    """The number in a control file; None when the file is absent or says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0

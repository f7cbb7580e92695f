"""Stack directories: adapters in PEFT's layout, each in a directory of its own, and their order.

`stack.json` holds `version`, `base` (fingerprint or null) and `parts`, lowest first, each with
`name`, `directory` (a plain name) and `fingerprint`. Everything is checked when it is read.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from halfbyte.adapters.adapter import Adapter
from halfbyte.adapters.peft_files import CONFIG_FILE, read_adapter, write_adapter
from halfbyte.adapters.stack import Stack, StackPart, base_of, order_problems
from halfbyte.errors import FormatError, HalfbyteError, VerificationError
from halfbyte.storage.atomic import new_directory
from halfbyte.storage.json_file import read_json_object

STACK_FILE = "stack.json"
STACK_VERSION = 1
MAX_PARTS = 64

_DIRECTORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class PartRecord:
    """An entry of `stack.json`."""

    name: str
    directory: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class StackRecord:
    """The content of `stack.json`.

    Attributes:
        base: Fingerprint of the base; None where nothing says.
        parts: Lowest first.
    """

    base: str | None
    parts: tuple[PartRecord, ...]


def is_stack(directory: str | Path) -> bool:
    """Whether a directory says that it holds a stack."""
    return (Path(directory) / STACK_FILE).exists()


def load_adapter(directory: str | Path) -> Adapter:
    """An adapter from a directory of PEFT's layout, or a stack as one adapter.

    Raises:
        HalfbyteError: See `read_adapter` and `read_stack`.
    """
    return read_stack(directory).flatten() if is_stack(directory) else read_adapter(directory)


def load_parts(directory: str | Path) -> tuple[StackPart, ...]:
    """The parts of a stack, lowest first, or an adapter as the only one.

    Raises:
        HalfbyteError: See `read_adapter` and `read_stack`.
    """
    if is_stack(directory):
        return read_stack(directory).parts
    return (StackPart.of(name_of(directory), read_adapter(directory)),)


def name_of(directory: str | Path) -> str:
    """What an adapter is called: its directory's name, or that of its run."""
    path = Path(directory).absolute()
    return path.parent.name if path.name == "adapter" else path.name


def read_stack(directory: str | Path) -> Stack:
    """Read a stack, and check that it is what its record says.

    Raises:
        FormatError: The record or a part is malformed or missing; lists everything.
        VerificationError: A part is not the one that was recorded, or does not belong where it
            stands; lists everything.
    """
    directory = Path(directory)
    record = read_stack_record(directory)
    adapters: list[Adapter] = []
    problems = []
    for part in record.parts:
        try:
            adapters.append(read_adapter(directory / part.directory))
        except HalfbyteError as error:
            problems.append("; ".join((error.message, *error.problems)))
    if problems:
        raise FormatError(f"{directory}: parts of the stack cannot be read", problems=problems)
    parts = tuple(
        StackPart.of(entry.name, adapter)
        for entry, adapter in zip(record.parts, adapters, strict=True)
    )
    problems = [
        f"{entry.directory}: fingerprint {entry.fingerprint} expected, found {part.fingerprint}"
        for entry, part in zip(record.parts, parts, strict=True)
        if entry.fingerprint != part.fingerprint
    ]
    if (base := base_of(parts)) != record.base:
        problems.append(f"base: {base} expected, as its parts say, found {record.base}")
    if problems := [*problems, *order_problems(parts)]:
        raise VerificationError(f"{directory}: not the stack that was written", problems=problems)
    return Stack(parts)


def read_stack_record(directory: Path) -> StackRecord:
    """What `stack.json` says, well-formed, and a directory for each part; no tensor is read.

    Raises:
        MissingFileError: There is no `stack.json`.
        FormatError: It is malformed, or a part is missing or a link; lists everything.
    """
    content = read_json_object(directory / STACK_FILE)
    problems = _record_problems(content)
    if not problems:
        record = _to_record(content)
        for index, part in enumerate(record.parts):
            if problem := _directory_problem(directory / part.directory):
                problems.append(f"parts[{index}]: {part.directory}: {problem}")
        if not problems:
            return record
    raise FormatError(f"{directory / STACK_FILE}: not a stack", problems=problems)


def write_stack(
    stack: Stack, directory: str | Path, *, linears: Collection[str] = (), replace: bool = False
) -> None:
    """Write a stack, whole or not at all.

    Args:
        stack: What to write.
        directory: Created; must not exist unless `replace`.
        linears: Paths of all linear layers of the base; see `write_adapter`.
        replace: Whether an existing directory may be replaced.

    Raises:
        StorageError: It exists, or writing failed.
    """
    with new_directory(Path(directory), replace=replace) as target:
        entries = []
        for number, part in enumerate(stack.parts, start=1):
            folder = f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '-', part.name)[:80]}"
            write_adapter(part.adapter, target / folder, linears=linears)
            entries.append(
                {"name": part.name, "directory": folder, "fingerprint": part.fingerprint}
            )
        content = {"version": STACK_VERSION, "base": stack.base, "parts": entries}
        (target / STACK_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _record_problems(content: Mapping[str, object]) -> list[str]:
    problems = _key_problems(content, {"version", "base", "parts"}, "")
    version, base, parts = (content.get(key) for key in ("version", "base", "parts"))
    if type(version) is not int or version != STACK_VERSION:
        problems.append(f"version: {STACK_VERSION} expected, found {version!r:.40}")
    if base is not None and not _matches(_FINGERPRINT, base):
        problems.append(f"base: 64 hexadecimal digits or null expected, found {base!r:.80}")
    if not isinstance(parts, list) or not 1 <= len(parts) <= MAX_PARTS:
        found = len(parts) if isinstance(parts, list) else type(parts).__name__
        return [*problems, f"parts: a list of 1 to {MAX_PARTS} expected, found {found}"]
    for index, part in enumerate(parts):
        problems += _part_problems(part, f"parts[{index}]")
    folders = [part.get("directory") for part in parts if isinstance(part, dict)]
    problems += [
        f"parts[{index}].directory: {folder!r:.80} stands in the stack already"
        for index, folder in enumerate(folders)
        if folder is not None and folder in folders[:index]
    ]
    return problems


def _part_problems(part: object, where: str) -> list[str]:
    if not isinstance(part, dict):
        return [f"{where}: an object expected, found {type(part).__name__}"]
    problems = _key_problems(part, {"name", "directory", "fingerprint"}, f"{where}.")
    name, folder, fingerprint = (part.get(key) for key in ("name", "directory", "fingerprint"))
    if not isinstance(name, str) or not name.isprintable() or not name:
        problems.append(f"{where}.name: printable text expected, found {name!r:.80}")
    if not _matches(_DIRECTORY, folder):
        problems.append(
            f"{where}.directory: the plain name of a directory here expected, found {folder!r:.80}"
        )
    if not _matches(_FINGERPRINT, fingerprint):
        problems.append(
            f"{where}.fingerprint: 64 hexadecimal digits expected, found {fingerprint!r:.80}"
        )
    return problems


def _key_problems(content: Mapping[str, object], known: set[str], where: str) -> list[str]:
    return [f"{where}{key:.40}: unknown" for key in content if key not in known]


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _directory_problem(path: Path) -> str | None:
    if path.is_symlink():
        return "a link; a part has to lie in the stack"
    if not path.is_dir():
        return "there is no such directory"
    if is_stack(path):
        return "a stack itself; a stack holds adapters"
    if not (path / CONFIG_FILE).exists():
        return f"no adapter: it has no {CONFIG_FILE}"
    return None


def _to_record(content: Mapping[str, object]) -> StackRecord:
    """The record of content that has no problems."""
    base, parts = content["base"], content["parts"]
    assert isinstance(parts, list)  # noqa: S101  (checked by `_record_problems`)
    return StackRecord(
        base if isinstance(base, str) else None, tuple(PartRecord(**part) for part in parts)
    )

"""The adapters that an expression names: read, and checked against each other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from halfbyte.adapters.adapter import Adapter
from halfbyte.adapters.fingerprint import fingerprint_adapter
from halfbyte.adapters.stack import Stack as TrainedStack
from halfbyte.adapters.stack import (
    StackPart,
    base_fingerprint,
    order_problems,
    trained_on_top_of,
)
from halfbyte.adapters.stack_files import load_parts
from halfbyte.composition.expression import Node, stacks_of
from halfbyte.errors import (
    FormatError,
    HalfbyteError,
    UnsafeArtifactError,
    VerificationError,
)

_SHORT = 16
"""Digits of a fingerprint in messages."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """An adapter, or a stack as one, by its name in expressions.

    Attributes:
        name: In expressions.
        directory: Where it was read.
        adapter: Its factors.
        fingerprint: Of factors and scalings.
        members: The adapters of a stack, lowest first; else the adapter as the only one.
    """

    name: str
    directory: Path
    adapter: Adapter
    fingerprint: str
    members: tuple[StackPart, ...]

    @property
    def base(self) -> Mapping[str, object]:
        """What its provenance says of its base; empty where there is nothing."""
        record = (self.adapter.provenance or {}).get("base")
        return record if isinstance(record, dict) else {}

    @property
    def base_fingerprint(self) -> str | None:
        """Of the model it was trained on, where that is known."""
        return base_fingerprint(self.adapter)


def read_parts(adapters: Mapping[str, str | Path]) -> dict[str, Part]:
    """Read adapters by name.

    Raises:
        HalfbyteError: As `load_parts`, for all that cannot be read at once.
    """
    parts: dict[str, Part] = {}
    errors: dict[str, HalfbyteError] = {}
    for name, directory in adapters.items():
        try:
            members = load_parts(directory)
        except HalfbyteError as error:
            errors[name] = error
            continue
        parts[name] = _to_part(name, Path(directory), members)
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        unsafe = any(isinstance(error, UnsafeArtifactError) for error in errors.values())
        kind = UnsafeArtifactError if unsafe else FormatError
        problems = [f"{name}: {line}" for name, error in errors.items() for line in _lines(error)]
        raise kind("adapters cannot be read", problems=problems)
    return parts


def require_compatible(parts: Mapping[str, Part], node: Node) -> tuple[str, ...]:
    """Check that adapters can be combined as an expression wants.

    Returns:
        What could not be verified, a sentence each.

    Raises:
        VerificationError: They were trained on different bases, or in another order than a stack
            says.
        FormatError: Their layers have different shapes. Either error lists everything.
    """
    origins = [*_base_problems(parts), *_order_problems(parts, node)]
    shapes = _shape_problems(parts)
    if origins or shapes:
        kind = VerificationError if origins else FormatError
        raise kind("these adapters cannot be combined", problems=[*origins, *shapes])
    return tuple(_unverified(parts))


def features_of(parts: Mapping[str, Part]) -> dict[str, tuple[int, int]]:
    """Module path -> output and input features, over all adapters, in order of appearance."""
    found: dict[str, tuple[int, int]] = {}
    for part in parts.values():
        for path, update in part.adapter.modules.items():
            found.setdefault(path, (update.b_OR.shape[0], update.a_RI.shape[1]))
    return found


def _to_part(name: str, directory: Path, members: tuple[StackPart, ...]) -> Part:
    if len(members) == 1:
        return Part(name, directory, members[0].adapter, members[0].fingerprint, members)
    flat = TrainedStack(members).flatten()
    return Part(name, directory, flat, fingerprint_adapter(flat), members)


def _lines(error: HalfbyteError) -> list[str]:
    return [f"{error.message}: {line}" for line in error.problems] or [error.message]


def _base_problems(parts: Mapping[str, Part]) -> list[str]:
    known = {n: f for n, part in parts.items() if (f := part.base_fingerprint) is not None}
    if len(set(known.values())) < 2:  # noqa: PLR2004  (the same base, or one known)
        return []
    return [
        f"{name} was trained on the base {fingerprint[:_SHORT]}"
        + (f" ({base})" if (base := parts[name].adapter.base_model) else "")
        for name, fingerprint in known.items()
    ]


def _shape_problems(parts: Mapping[str, Part]) -> list[str]:
    problems = []
    first: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, part in parts.items():
        for path, update in part.adapter.modules.items():
            shape = (update.b_OR.shape[0], update.a_RI.shape[1])
            owner, expected = first.setdefault(path, (name, shape))
            if shape != expected:
                problems.append(
                    f"{path}: {list(expected)} in {owner}, {list(shape)} in {name}: "
                    "their bases differ"
                )
    return problems


def _order_problems(parts: Mapping[str, Part], node: Node) -> list[str]:
    return [
        problem
        for stack in stacks_of(node)
        for problem in order_problems(
            [member for part in stack.parts for member in _renamed(parts[part.name])]
        )
    ]


def _renamed(part: Part) -> tuple[StackPart, ...]:
    """The members by the name that the expression has for them, where it has one."""
    if len(part.members) > 1:
        return part.members
    return (replace(part.members[0], name=part.name),)


def _unverified(parts: Mapping[str, Part]) -> Iterator[str]:
    used = {member.fingerprint for part in parts.values() for member in part.members}
    for name, part in parts.items():
        if part.base_fingerprint is None:
            base = part.adapter.base_model or "not named"
            yield f"{name}: its base is known by name only ({base}), so it was not compared"
        below = trained_on_top_of(part.members[0].adapter) or ()
        if missing := [entry.name for entry in below if entry.fingerprint not in used]:
            yield f"{name} was trained on top of {' > '.join(missing)}, which is not part of this"

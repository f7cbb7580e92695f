"""The adapters that an expression names: read, and checked against each other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from halfbyte.adapters.adapter import Adapter
from halfbyte.adapters.fingerprint import fingerprint_adapter
from halfbyte.adapters.stack_files import load_adapter
from halfbyte.composition.expression import Node, Stack, stacks_of
from halfbyte.errors import (
    FormatError,
    HalfbyteError,
    UnsafeArtifactError,
    UsageError,
    VerificationError,
)

_SHORT = 16
"""Digits of a fingerprint in messages."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """An adapter by its name in expressions.

    Attributes:
        name: In expressions.
        directory: Where it was read.
        adapter: Its factors.
        fingerprint: Of factors and scalings.
    """

    name: str
    directory: Path
    adapter: Adapter
    fingerprint: str

    @property
    def base(self) -> Mapping[str, object]:
        """What its provenance says of its base; empty where there is nothing."""
        record = (self.adapter.provenance or {}).get("base")
        return record if isinstance(record, dict) else {}

    @property
    def base_fingerprint(self) -> str | None:
        """Of the model it was trained on, where that is known."""
        found = self.base.get("fingerprint")
        return found if isinstance(found, str) else None

    @property
    def trained_over(self) -> tuple[str, ...] | None:
        """Fingerprints of the adapters it was trained on top of; None where nothing is known."""
        if self.adapter.provenance is None:
            return None
        below = self.adapter.provenance.get("on_top_of", ())
        records = below if isinstance(below, list) else []
        found = [record.get("fingerprint") for record in records if isinstance(record, dict)]
        return tuple(fingerprint for fingerprint in found if isinstance(fingerprint, str))


def read_parts(adapters: Mapping[str, str | Path]) -> dict[str, Part]:
    """Read adapters by name.

    Raises:
        UsageError: There are none.
        HalfbyteError: As `load_adapter`, for all that cannot be read at once.
    """
    if not adapters:
        raise UsageError("adapters: at least one expected, found none")
    parts: dict[str, Part] = {}
    errors: dict[str, HalfbyteError] = {}
    for name, directory in adapters.items():
        try:
            adapter = load_adapter(directory)
        except HalfbyteError as error:
            errors[name] = error
            continue
        parts[name] = Part(name, Path(directory), adapter, fingerprint_adapter(adapter))
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
    return [p for stack in stacks_of(node) for p in _stack_problems(parts, stack)]


def _stack_problems(parts: Mapping[str, Part], stack: Stack) -> list[str]:
    problems = []
    members = [parts[part.name] for part in stack.parts]
    for place, part in enumerate(members):
        over = part.trained_over
        below = tuple(member.fingerprint for member in members[:place])
        if over is None or over == below:
            continue
        above = [member.name for member in members[place + 1 :] if member.fingerprint in over]
        if above:
            problems.append(
                f"{part.name} was trained on top of {', '.join(above)}, not below: "
                f"write {above[-1]} > {part.name}"
            )
        elif not over:
            problems.append(
                f"{part.name} was trained on the base alone, not on top of "
                f"{members[place - 1].name}: use '+' to mix them"
            )
        else:
            problems.append(
                f"{part.name} was trained on top of {_short(over)}, "
                f"the stack puts it on top of {_short(below) or 'the base'}"
            )
    return problems


def _short(fingerprints: tuple[str, ...]) -> str:
    return " > ".join(fingerprint[:_SHORT] for fingerprint in fingerprints)


def _unverified(parts: Mapping[str, Part]) -> Iterator[str]:
    fingerprints = {part.fingerprint for part in parts.values()}
    for name, part in parts.items():
        if part.base_fingerprint is None:
            base = part.adapter.base_model or "not named"
            yield f"{name}: its base is known by name only ({base}), so it was not compared"
        if missing := tuple(f for f in part.trained_over or () if f not in fingerprints):
            yield f"{name} was trained on top of {_short(missing)}, which is not part of this"

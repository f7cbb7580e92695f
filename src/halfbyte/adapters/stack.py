"""Adapters in the order in which each was trained on top of those before it.

An adapter that was trained over frozen others corrects *them*: what it computes means something
only above exactly these, in this order. A stack keeps that order, and refuses any other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.fingerprint import fingerprint_adapter
from halfbyte.errors import VerificationError

ON_TOP_OF = "on_top_of"
"""Key of the provenance: name and fingerprint of each frozen adapter below; empty for the base."""


def base_fingerprint(adapter: Adapter) -> str | None:
    """The fingerprint of the base it was trained on; None where nothing says."""
    record = (adapter.provenance or {}).get("base")
    found = record.get("fingerprint") if isinstance(record, Mapping) else None
    return found if isinstance(found, str) else None


@dataclass(frozen=True, slots=True)
class Below:
    """An adapter that was frozen below another one when that was trained."""

    name: str
    fingerprint: str


def trained_on_top_of(adapter: Adapter) -> tuple[Below, ...] | None:
    """What was below it in training, lowest first; None where nothing says so."""
    record = (adapter.provenance or {}).get(ON_TOP_OF)
    if not isinstance(record, list):
        return None
    return tuple(
        Below(str(entry.get("name", "unknown")), str(entry.get("fingerprint")))
        if isinstance(entry, Mapping)
        else Below("unknown", str(entry))
        for entry in record
    )


@dataclass(frozen=True, slots=True, eq=False)
class StackPart:
    """One adapter of a stack.

    Attributes:
        name: What people call it.
        adapter: Its factors.
        fingerprint: See `fingerprint_adapter`.
    """

    name: str
    adapter: Adapter
    fingerprint: str

    @classmethod
    def of(cls, name: str, adapter: Adapter) -> Self:
        """A part with its fingerprint."""
        return cls(name, adapter, fingerprint_adapter(adapter))


def base_of(parts: Sequence[StackPart]) -> str | None:
    """Fingerprint of the base that parts name; None where none does."""
    named = (base_fingerprint(part.adapter) for part in parts)
    return next((base for base in named if base is not None), None)


def order_problems(parts: Sequence[StackPart]) -> list[str]:
    """Why parts, lowest first, are no stack; empty if they are one."""
    base = base_of(parts)
    problems = [] if parts else ["at least one adapter expected, found none"]
    for index, part in enumerate(parts):
        below = parts[:index]
        twins = [other.name for other in below if other.fingerprint == part.fingerprint]
        if twins:
            problems.append(f"{part.name} is {twins[0]} again: nothing stands on itself")
            continue
        trained_on = trained_on_top_of(part.adapter)
        if trained_on is not None and [entry.fingerprint for entry in trained_on] != [
            other.fingerprint for other in below
        ]:
            problems.append(
                f"{part.name} was trained on top of {_names(trained_on)}, "
                f"and would stand on {_names(below)}"
            )
        found = base_fingerprint(part.adapter)
        if found not in (None, base):
            problems.append(f"{part.name}: trained on base {found}, expected {base}")
    return problems


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Adapters on one base, each trained on top of those before it.

    Attributes:
        parts: Lowest first, at least one.

    Raises:
        VerificationError: The parts were not trained in this order, or on another base. Lists
            everything.
    """

    parts: tuple[StackPart, ...]

    def __post_init__(self) -> None:
        if problems := order_problems(self.parts):
            raise VerificationError(
                f"not a stack: {self.order or 'nothing'}",
                problems=problems,
                hint="Each adapter was trained to correct exactly those below it. To add up "
                'adapters that were trained apart, use `halfbyte compose "a + b"`.',
            )

    @property
    def base(self) -> str | None:
        """Fingerprint of the base that the parts name; None where none does."""
        return base_of(self.parts)

    @property
    def order(self) -> str:
        """`a > b > c`, the lowest first."""
        return " > ".join(part.name for part in self.parts)

    @property
    def below(self) -> list[dict[str, str]]:
        """What the provenance of an adapter trained on top of it holds under `ON_TOP_OF`."""
        return [{"name": part.name, "fingerprint": part.fingerprint} for part in self.parts]

    def without_last(self) -> "Stack":
        """This stack without the adapter on top.

        Raises:
            VerificationError: It has no other.
        """
        return Stack(self.parts[:-1])

    def flatten(self) -> Adapter:
        """One adapter that computes what the stack does.

        Factors are written side by side, so ranks add up and no product is formed. In a layer that
        several parts adapt, B is multiplied by the scaling of its part and rounded once; powers of
        two leave nothing to round.
        """
        updates: dict[str, list[LoraUpdate]] = {}
        for part in self.parts:
            for path, update in part.adapter.modules.items():
                updates.setdefault(path, []).append(update)
        lowest = self.parts[0].adapter
        record = (lowest.provenance or {}).get("base")
        provenance = {
            "base": {**(record if isinstance(record, Mapping) else {}), "fingerprint": self.base},
            "stack": self.below,
        }
        modules = {path: _stacked(found) for path, found in updates.items()}
        return Adapter(modules, lowest.base_model, provenance=provenance)


def _names(parts: Sequence[StackPart] | Sequence[Below]) -> str:
    if not parts:
        return "the base alone"
    return " > ".join(f"{part.name} ({part.fingerprint:.12})" for part in parts)


def _stacked(updates: list[LoraUpdate]) -> LoraUpdate:
    """The sum of updates of one layer as one update."""
    if len(updates) == 1:
        (only,) = updates
        return LoraUpdate(only.a_RI, only.b_OR, alpha=only.scaling * only.rank)
    return LoraUpdate.sum_of([(each.scaling, each.b_OR, each.a_RI) for each in updates])

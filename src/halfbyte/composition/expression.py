"""What an expression over adapters says, as a tree of values.

Every node stands for one update of every layer. Sums and stacks are linear in the adapters and
stay in factored form; `ties` and `dare` look at the elements of the products.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Name:
    """An adapter by the name it is bound to."""

    name: str


@dataclass(frozen=True, slots=True)
class Sum:
    """Terms, each with the weight it is multiplied by."""

    terms: tuple[tuple[float, "Node"], ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """`a > b`: adapters in the order in which each was trained on top of those before it."""

    parts: tuple[Name, ...]


@dataclass(frozen=True, slots=True)
class Ties:
    """TIES merging of the parts.

    Attributes:
        parts: What is merged.
        density: Part of the elements of each that is kept, the largest ones.
    """

    parts: tuple["Node", ...]
    density: float


@dataclass(frozen=True, slots=True)
class Dare:
    """The sum of the parts after dropping elements at random and rescaling the rest.

    Attributes:
        parts: What is added up.
        drop: Probability with which an element is dropped.
        seed: Of the draws.
    """

    parts: tuple["Node", ...]
    drop: float
    seed: int


@dataclass(frozen=True, slots=True)
class Svd:
    """The nearest update of a lower rank; exactly one of the limits is given.

    Attributes:
        part: What is compressed.
        rank: At most this.
        fidelity: The smallest rank that keeps this part of every layer's energy.
    """

    part: "Node"
    rank: int | None = None
    fidelity: float | None = None


Node = Name | Sum | Stack | Ties | Dare | Svd


def parts_of(node: Node) -> tuple[Node, ...]:
    """The nodes that a node is made of."""
    match node:
        case Name():
            return ()
        case Sum(terms):
            return tuple(part for _, part in terms)
        case Svd(part):
            return (part,)
        case Stack(parts) | Ties(parts) | Dare(parts):
            return parts


def stacks_of(node: Node) -> Iterator[Stack]:
    """All stacks in a tree, from left to right."""
    if isinstance(node, Stack):
        yield node
    for part in parts_of(node):
        yield from stacks_of(part)


def weights_of(node: Node) -> Mapping[str, float]:
    """Adapter -> the sum of the weights with which it enters, in order of appearance.

    For `ties`, `dare` and `svd` that is the weight before they do their work.
    """
    found: dict[str, float] = {}
    _add_weights(node, 1.0, found)
    return found


def _add_weights(node: Node, weight: float, found: dict[str, float]) -> None:
    match node:
        case Name(name):
            found[name] = found.get(name, 0.0) + weight
        case Sum(terms):
            for factor, part in terms:
                _add_weights(part, weight * factor, found)
        case _:
            for part in parts_of(node):
                _add_weights(part, weight, found)


def to_text(node: Node) -> str:
    """An expression that parses to this node."""
    match node:
        case Name(name):
            return name
        case Sum(terms):
            return _sum_text(terms)
        case Stack(parts):
            return " > ".join(part.name for part in parts)
        case Ties(parts, density):
            return f"ties({_list_text(parts)}, density={density!r})"
        case Dare(parts, drop, seed):
            return f"dare({_list_text(parts)}, drop={drop!r}, seed={seed})"
        case Svd(part, rank, fidelity):
            limit = f"rank={rank}" if rank is not None else f"fidelity={fidelity!r}"
            return f"svd({to_text(part)}, {limit})"


def _list_text(parts: tuple[Node, ...]) -> str:
    return ", ".join(to_text(part) for part in parts)


def _sum_text(terms: tuple[tuple[float, Node], ...]) -> str:
    text = ""
    for weight, part in terms:
        factor = to_text(part)
        if isinstance(part, Sum | Stack):
            factor = f"({factor})"
        if abs(weight) != 1:
            factor = f"{abs(weight)!r}*{factor}"
        if not text:
            text = f"-{factor}" if weight < 0 else factor
        else:
            text += f" {'-' if weight < 0 else '+'} {factor}"
    return text

"""The value of an expression, layer by layer.

Linear nodes stay factored; `ties` and `dare` give a matrix of the layer's shape, which is
compressed again before the next layer begins. Every loss is recorded as a cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from halfbyte.composition.compress import Limit, compress, compress_dense
from halfbyte.composition.expression import (
    Dare,
    Name,
    Node,
    Stack,
    Sum,
    Svd,
    Ties,
    parts_of,
    to_text,
)
from halfbyte.composition.factored import ZERO, Factored
from halfbyte.composition.pruning import Update, dare, ties, to_dense


@dataclass(frozen=True, slots=True)
class Cut:
    """What one compression of one layer lost.

    Attributes:
        expression: What was compressed.
        rank: That is left.
        energy: Squared Frobenius norm before.
        dropped: Squared Frobenius norm of the difference.
    """

    expression: str
    rank: int
    energy: float
    dropped: float


@dataclass(frozen=True, slots=True, eq=False)
class LayerValue:
    """An expression at one layer.

    Attributes:
        update: In factored form; without terms where the expression is zero there.
        cuts: In the order in which they were made; none when the value is exact.
    """

    update: Factored
    cuts: tuple[Cut, ...]


def evaluate_layer(node: Node, updates: Mapping[str, Factored], path: str) -> LayerValue:
    """Evaluate an expression at one layer.

    What is dense at the end is compressed to the rank of all adapters in it together: the rank that
    their exact sum would have.

    Args:
        node: The expression.
        updates: Adapter -> its update of this layer; absent where it has none.
        path: Of the layer.
    """
    evaluation = _Evaluation(updates, path)
    value = evaluation.value(node)
    if not isinstance(value, Factored):
        value = evaluation.limited(node, value, Limit(rank=evaluation.rank_of(node)))
    return LayerValue(value, tuple(evaluation.cuts))


@dataclass(slots=True, eq=False)
class _Evaluation:
    updates: Mapping[str, Factored]
    path: str
    cuts: list[Cut] = field(default_factory=list)

    def value(self, node: Node) -> Update:
        match node:
            case Name(name):
                return self.updates.get(name, ZERO)
            case Sum(terms):
                return self._sum(terms)
            case Stack(parts):
                return self._sum(tuple((1.0, part) for part in parts))
            case Ties(parts, density):
                found = [value for _, value in self._present(parts)]
                return ties(found, density) if found else ZERO
            case Dare(parts, drop, seed):
                placed = self._present(parts)
                return dare(placed, drop, seed, self.path) if placed else ZERO
            case Svd(part, rank, fidelity):
                return self.limited(part, self.value(part), Limit(rank, fidelity))

    def limited(self, node: Node, value: Update, limit: Limit) -> Factored:
        if isinstance(value, Factored) and not value.terms:
            return ZERO
        made = (
            compress(value, limit) if isinstance(value, Factored) else compress_dense(value, limit)
        )
        self.cuts.append(Cut(to_text(node), made.update.rank, made.energy, made.dropped))
        return made.update

    def rank_of(self, node: Node) -> int:
        """Ranks of all adapters in an expression together, each counted once."""
        names = set(_names_in(node))
        return sum(self.updates[name].rank for name in names if name in self.updates)

    def _sum(self, terms: tuple[tuple[float, Node], ...]) -> Update:
        total: Update = ZERO
        for weight, part in terms:
            value = self.value(part) if weight else ZERO
            scaled = value.times(weight) if isinstance(value, Factored) else value * weight
            total = _added(total, scaled)
        return total

    def _present(self, parts: tuple[Node, ...]) -> list[tuple[int, Update]]:
        """Places and values of the parts that are not zero by construction."""
        values = enumerate(self.value(part) for part in parts)
        return [(i, v) for i, v in values if not isinstance(v, Factored) or v.terms]


def _added(first: Update, second: Update) -> Update:
    if isinstance(first, Factored) and isinstance(second, Factored):
        return first.plus(second)
    if isinstance(first, Factored) and not first.terms:
        return second
    if isinstance(second, Factored) and not second.terms:
        return first
    return to_dense(first) + to_dense(second)


def _names_in(node: Node) -> list[str]:
    if isinstance(node, Name):
        return [node.name]
    return [name for part in parts_of(node) for name in _names_in(part)]

"""What a composition kept and dropped, by layer and in total."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from halfbyte.composition.evaluate import Cut

COLUMNS = ("compressed", "layers", "rank", "energy", "kept", "rel. error")


@dataclass(frozen=True, slots=True)
class LayerEnergy:
    """One layer of the result.

    Attributes:
        path: Of the layer.
        rank: As written.
        energy: Squared Frobenius norm of the update as written.
        cuts: What was lost on the way; none when the update is exact.
    """

    path: str
    rank: int
    energy: float
    cuts: tuple[Cut, ...]


@dataclass(frozen=True, slots=True)
class Total:
    """All cuts of one kind of layer at one place of the expression.

    Attributes:
        label: Which.
        ranks: Smallest and largest rank that is left.
        num_layers: How many.
        energy: Before.
        dropped: Of the difference.
    """

    label: str
    ranks: tuple[int, int]
    num_layers: int
    energy: float
    dropped: float

    @property
    def kept(self) -> float:
        """Part of the energy; 1 where there was none."""
        return 1 - self.dropped / self.energy if self.energy else 1.0

    @property
    def relative_error(self) -> float:
        """Norm of the difference over the norm before; 0 where there was nothing."""
        return float((self.dropped / self.energy) ** 0.5) if self.energy else 0.0

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        low, high = self.ranks
        return (
            self.label,
            str(self.num_layers),
            str(low) if low == high else f"{low}..{high}",
            f"{self.energy:.4g}",
            f"{self.kept:.3%}",
            f"{self.relative_error:.3%}",
        )


@dataclass(frozen=True, slots=True)
class EnergyReport:
    """All layers of a composition, in order."""

    layers: tuple[LayerEnergy, ...]

    @property
    def exact(self) -> bool:
        """Whether nothing was compressed."""
        return not any(layer.cuts for layer in self.layers)

    @property
    def energy(self) -> float:
        """Of the result, all layers together."""
        return sum(layer.energy for layer in self.layers)

    def totals(self) -> list[Total]:
        """One for each expression that was compressed."""
        return [
            _total(expression, [cut for _, cut in cuts])
            for expression, cuts in self._by_expression().items()
        ]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Rows of a table: kinds of layers, then their total, for each compressed expression."""
        for expression, cuts in self._by_expression().items():
            kinds: dict[str, list[Cut]] = {}
            for path, cut in cuts:
                kinds.setdefault(path.rpartition(".")[2], []).append(cut)
            for kind, found in kinds.items():
                yield _total(kind, found).cells()
            yield _total(expression, [cut for _, cut in cuts]).cells()

    def to_json(self) -> dict[str, object]:
        """Everything, layer by layer."""
        return {
            "exact": self.exact,
            "energy": self.energy,
            "compressed": [
                {
                    "expression": total.label,
                    "energy": total.energy,
                    "dropped": total.dropped,
                    "kept": total.kept,
                    "relative_error": total.relative_error,
                }
                for total in self.totals()
            ],
            "layers": [
                {
                    "path": layer.path,
                    "rank": layer.rank,
                    "energy": layer.energy,
                    "cuts": [asdict(cut) for cut in layer.cuts],
                }
                for layer in self.layers
            ],
        }

    def _by_expression(self) -> dict[str, list[tuple[str, Cut]]]:
        found: dict[str, list[tuple[str, Cut]]] = {}
        for layer in self.layers:
            for cut in layer.cuts:
                found.setdefault(cut.expression, []).append((layer.path, cut))
        return found


def _total(label: str, cuts: Sequence[Cut]) -> Total:
    ranks = [cut.rank for cut in cuts]
    return Total(
        label,
        (min(ranks), max(ranks)),
        len(cuts),
        sum(cut.energy for cut in cuts),
        sum(cut.dropped for cut in cuts),
    )

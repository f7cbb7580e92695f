"""One layer's update as a sum of scaled products `weight * B A`, which are never multiplied out.

Sums and multiples only collect terms, so they are exact; `stack` then writes all terms side by
side, which is exact but for one rounding of B.

Dimension key:
    I  input features         R  rank of a term
    O  output features        K  rank of all terms together
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.adapters.adapter import LoraUpdate


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """`weight * B A`.

    Attributes:
        weight: Scaling of the adapter and weight of the expression together.
        b_OR: float32 `[O, R]`.
        a_RI: float32 `[R, I]`.
    """

    weight: float
    b_OR: Tensor
    a_RI: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """A sum of terms; zero when there are none."""

    terms: tuple[Term, ...] = ()

    @property
    def rank(self) -> int:
        """K, an upper bound of the rank of the sum."""
        return sum(term.a_RI.shape[0] for term in self.terms)

    def times(self, weight: float) -> "Factored":
        """A multiple."""
        if weight == 0:
            return ZERO
        return Factored(tuple(Term(weight * t.weight, t.b_OR, t.a_RI) for t in self.terms))

    def plus(self, other: "Factored") -> "Factored":
        """The sum. Terms of the same factors become one: `a + a` has the rank of `a`."""
        merged = {(id(t.b_OR), id(t.a_RI)): t for t in self.terms}
        for term in other.terms:
            key = (id(term.b_OR), id(term.a_RI))
            weight = term.weight + (merged[key].weight if key in merged else 0.0)
            merged[key] = Term(weight, term.b_OR, term.a_RI)
        return Factored(tuple(term for term in merged.values() if term.weight))

    def stack(self) -> tuple[Tensor, Tensor]:
        """All terms side by side in float64: B `[O, K]`, weights included, and A `[K, I]`."""
        b_OK = torch.cat([term.b_OR.double().mul_(term.weight) for term in self.terms], dim=1)
        return b_OK, torch.cat([term.a_RI.double() for term in self.terms])

    def energy(self) -> float:
        """Squared Frobenius norm of the sum, from Gram matrices `[K, K]` in float64."""
        if not self.terms:
            return 0.0
        b_OK, a_KI = self.stack()
        return max(0.0, ((b_OK.T @ b_OK) * (a_KI @ a_KI.T)).sum().item())

    def dense(self) -> Tensor:
        """The product itself, float32 `[O, I]`; needs at least one term."""
        first, *rest = self.terms
        total_OI = (first.b_OR * first.weight) @ first.a_RI
        for term in rest:
            total_OI.addmm_(term.b_OR, term.a_RI, alpha=term.weight)
        return total_OI

    def to_update(self) -> LoraUpdate:
        """The sum as one update of scaling 1, B rounded once; needs at least one term."""
        return LoraUpdate.sum_of([(term.weight, term.b_OR, term.a_RI) for term in self.terms])


ZERO = Factored()


def from_update(update: LoraUpdate) -> Factored:
    """An adapter's update of one layer."""
    return Factored((Term(1.0, update.b_OR, update.a_RI),)).times(update.scaling)

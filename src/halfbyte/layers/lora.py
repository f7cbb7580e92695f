"""Low-rank updates: factors, which tokens use which, and their arithmetic.

Factors stay in float32; products run in the dtype of the input. Updates that see the same input
are multiplied together: their A's stacked make one product instead of one each.

Dimension key:
    T  tokens, packed        I  input features
    R  adapter rank          O  output features
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.formats.checks import describe
from halfbyte.kernels.gemm import matmul, matmul_add_
from halfbyte.layers.segments import Segments


@dataclass(slots=True, eq=False)
class LoraFactors:
    """One adapter's update of one linear: `scaling * B A`.

    Attributes:
        a_RI: float32 `[R, I]`.
        b_OR: float32 `[O, R]`.
        scaling: alpha / R, or alpha / sqrt(R) for rsLoRA.
        dropout: Probability that an input feature is dropped in training.
    """

    a_RI: Tensor
    b_OR: Tensor
    scaling: float
    dropout: float = 0.0
    _cast: tuple[object, Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        problems = []
        for name, factor in (("A", self.a_RI), ("B", self.b_OR)):
            if factor.dtype != torch.float32 or factor.dim() != 2:  # noqa: PLR2004
                problems.append(f"{name}: a float32 matrix expected, found {describe(factor)}")
        if not problems and self.a_RI.shape[0] != self.b_OR.shape[1]:
            problems.append(f"ranks differ: A {describe(self.a_RI)}, B {describe(self.b_OR)}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout: at least 0 and below 1 expected, found {self.dropout}")
        if problems:
            raise UsageError("not the factors of a low-rank update", problems=problems)

    @property
    def trainable(self) -> bool:
        """Whether either factor wants a gradient."""
        return self.a_RI.requires_grad or self.b_OR.requires_grad

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both factors in `dtype` without gradients, kept until a factor is written to."""
        key = (dtype, self.a_RI._version, self.b_OR._version)  # noqa: SLF001
        if self._cast is None or self._cast[0] != key:
            self._cast = (key, self.a_RI.detach().to(dtype), self.b_OR.detach().to(dtype))
        return self._cast[1], self._cast[2]


Mix = tuple[tuple[str, float], ...]
"""Adapters by name, each with the weight that its update gets."""

BASE_ONLY: Mix = ()


@dataclass(frozen=True, slots=True)
class Route:
    """Rows `begin` to `end` of the batch use the adapters of `mix`."""

    begin: int
    end: int
    mix: Mix


@dataclass(frozen=True, slots=True)
class Routing:
    """Which rows use which adapters in one forward.

    Attributes:
        routes: Non-empty mixes only, in order.
        num_tokens: T of the batch.
        dropout_seed: Seed of this step's dropout; None turns dropout off.
    """

    routes: tuple[Route, ...] = ()
    num_tokens: int = 0
    dropout_seed: int | None = None


NO_ADAPTERS = Routing()


def route(segments: Segments, mixes: Sequence[Mix], dropout_seed: int | None = None) -> Routing:
    """Rows of every mix, neighbours that share one joined.

    Args:
        segments: Its `adapters` index `mixes`; all segments use `mixes[0]` when it is empty.
        mixes: The mixes in use.
        dropout_seed: As in `Routing`.

    Raises:
        UsageError: An index points nowhere.
    """
    if not any(mixes):
        return NO_ADAPTERS
    indices = segments.adapters or (0,) * segments.num_segments
    if bad := sorted({i for i in indices if not 0 <= i < len(mixes)}):
        raise UsageError(f"adapter indices 0 to {len(mixes) - 1} expected, found {bad}")
    routes: list[Route] = []
    bounds = segments.bounds_q
    for begin, end, index in zip(bounds[:-1], bounds[1:], indices, strict=True):
        if routes and routes[-1].mix == mixes[index]:
            begin = routes.pop().begin  # noqa: PLW2901  (the joined run begins earlier)
        routes.append(Route(begin, end, mixes[index]))
    used = tuple(r for r in routes if r.mix)
    return Routing(used, segments.num_tokens, dropout_seed)


@dataclass(frozen=True, slots=True)
class Term:
    """One update in a group of linears that share an input.

    Attributes:
        output: Which linear of the group.
        factors: The update.
        weight: Of the adapter in the mix.
    """

    output: int
    factors: LoraFactors
    weight: float

    @property
    def scale(self) -> float:
        """What `x Aᵀ Bᵀ` is multiplied with."""
        return self.weight * self.factors.scaling


def find_terms(banks: Sequence[Mapping[str, LoraFactors]], mix: Mix) -> list[Term]:
    """The updates that a mix has in a group of linears, one bank a linear."""
    return [
        Term(output, bank[name], weight)
        for output, bank in enumerate(banks)
        for name, weight in mix
        if name in bank
    ]


def add_updates(x_TI: Tensor, outputs: Sequence[Tensor], terms: Sequence[Term]) -> None:
    """Add every term's `scale * x Aᵀ Bᵀ` to its output `[T, O]`, in place; no gradients."""
    if not terms:
        return
    pairs = [term.factors.cast(x_TI.dtype) for term in terms]
    stacked = pairs[0][0] if len(pairs) == 1 else torch.cat([a for a, _ in pairs])
    hidden = matmul(x_TI, stacked.T).split([a.shape[0] for a, _ in pairs], dim=1)
    for term, (_, b_OR), h_TR in zip(terms, pairs, hidden, strict=True):
        matmul_add_(outputs[term.output], h_TR, b_OR.T, alpha=term.scale)


def dropout_mask(shape: torch.Size, probability: float, seed: int) -> Tensor:
    """A bool mask of what to keep, a pure function of its arguments.

    Each element compares 16 random bits with the probability, so that is rounded to 1 / 65536.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int16)[: shape.numel()].view(shape)
    return bits >= round(probability * 2**16) - 2**15


def fold_seed(seed: int, key: int) -> int:
    """A seed for one place in the model out of the step's seed."""
    mixed = (seed * 0x9E3779B97F4A7C15 + key * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)

"""Packed tokens: where each sequence begins in one flat row, and what it has seen before.

Dimension key:
    T  tokens, packed        B  segments, one a sequence
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.formats.checks import describe


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Boundaries of sequences in a flat row of T tokens. Attention never crosses them.

    Attributes:
        cu_seqlens_q: int32 `[B + 1]`; segment b holds the tokens from entry b to entry b + 1.
        cu_seqlens_k: int32 `[B + 1]`; the same for keys, which include those of earlier tokens
            in a cache. Equal to `cu_seqlens_q` without one.
        positions: int64 `[T]`; the place of each token in its sequence, for rotary embeddings.
        adapters: For each segment the index of its adapter mix; empty when all use the first.
        bounds_q: `cu_seqlens_q` as numbers.
        bounds_k: `cu_seqlens_k` as numbers.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    positions: Tensor
    adapters: tuple[int, ...] = ()
    bounds_q: tuple[int, ...] = field(init=False, repr=False)
    bounds_k: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds_q", tuple(self.cu_seqlens_q.tolist()))
        object.__setattr__(self, "bounds_k", tuple(self.cu_seqlens_k.tolist()))
        if problems := self._problems():
            raise UsageError("not segments", problems=problems)

    def _problems(self) -> list[str]:
        problems = []
        for name, cu in (("cu_seqlens_q", self.cu_seqlens_q), ("cu_seqlens_k", self.cu_seqlens_k)):
            if cu.dtype != torch.int32 or cu.dim() != 1 or len(cu) < 2:  # noqa: PLR2004
                problems.append(f"{name}: int32 [B + 1] expected, found {describe(cu)}")
        if problems:
            return problems
        queries, keys = lengths(self.bounds_q), lengths(self.bounds_k)
        if self.bounds_q[0] != 0 or min(queries) < 1:
            problems.append("cu_seqlens_q: 0 first, then increasing numbers expected")
        if len(keys) != len(queries):
            problems.append(f"{len(queries)} segments of queries, {len(keys)} of keys")
        elif self.bounds_k[0] != 0 or any(k < q for q, k in zip(queries, keys, strict=True)):
            problems.append("cu_seqlens_k: 0 first, and no fewer keys than queries a segment")
        expected = (self.bounds_q[-1],)
        if self.positions.dtype != torch.int64 or tuple(self.positions.shape) != expected:
            problems.append(
                f"positions: int64 {list(expected)} expected, found {describe(self.positions)}"
            )
        if self.adapters and len(self.adapters) != len(queries):
            problems.append(f"adapters: {len(queries)} expected, found {len(self.adapters)}")
        return problems

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.bounds_q[-1]

    @property
    def num_segments(self) -> int:
        """B."""
        return len(self.bounds_q) - 1

    @property
    def cached(self) -> bool:
        """Whether some segment continues a sequence whose keys are in a cache."""
        return self.bounds_k != self.bounds_q


def pack(
    num_tokens: Sequence[int], num_past: Sequence[int] = (), adapters: tuple[int, ...] = ()
) -> Segments:
    """Segments of these lengths, one after the other.

    Args:
        num_tokens: Tokens of each segment.
        num_past: Tokens that precede each segment in a cache; none when empty.
        adapters: Index of the adapter mix of each segment.
    """
    past = list(num_past) or [0] * len(num_tokens)
    totals = [new + old for new, old in zip(num_tokens, past, strict=True)]
    positions = [torch.arange(old, total) for old, total in zip(past, totals, strict=True)]
    return Segments(
        torch.tensor([0, *accumulate(num_tokens)], dtype=torch.int32),
        torch.tensor([0, *accumulate(totals)], dtype=torch.int32),
        torch.cat(positions),
        adapters,
    )


def lengths(bounds: tuple[int, ...]) -> list[int]:
    """Length of each segment between consecutive bounds."""
    return [end - begin for begin, end in pairwise(bounds)]

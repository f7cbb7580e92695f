"""Boundaries of packed sequences: what they hold, and every way in which they can be wrong."""

import pytest
import torch

from halfbyte.errors import UsageError
from halfbyte.layers.segments import Segments, pack


def test_packing_lengths() -> None:
    segments = pack([2, 3], [0, 4])
    assert segments.bounds_q == (0, 2, 5)
    assert segments.bounds_k == (0, 2, 9)
    assert segments.positions.tolist() == [0, 1, 4, 5, 6]
    assert (segments.num_tokens, segments.num_segments, segments.cached) == (5, 2, True)
    assert not pack([2, 3]).cached


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("queries", "keys", "num_positions", "adapters", "fault"),
    [
        (torch.tensor([0, 2]), int32(0, 2), 2, (), "cu_seqlens_q: int32"),
        (int32(0), int32(0, 2), 2, (), "cu_seqlens_q: int32"),
        (int32(1, 2), int32(0, 2), 2, (), "0 first"),
        (int32(0, 2, 2), int32(0, 2, 4), 2, (), "increasing numbers"),
        (int32(0, 2), int32(0, 1), 2, (), "no fewer keys"),
        (int32(0, 2), int32(0, 2, 3), 2, (), "1 segments of queries, 2 of keys"),
        (int32(0, 2), int32(0, 2), 3, (), r"positions: int64 \[2\]"),
        (int32(0, 2), int32(0, 2), 2, (0, 1), "adapters: 1 expected"),
    ],
)
def test_faults_are_named(
    queries: torch.Tensor,
    keys: torch.Tensor,
    num_positions: int,
    adapters: tuple[int, ...],
    fault: str,
) -> None:
    with pytest.raises(UsageError, match=fault):
        Segments(queries, keys, torch.arange(num_positions), adapters)

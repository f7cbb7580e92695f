"""The stored tables, derived again from their definitions."""

import itertools
from statistics import NormalDist

import pytest
import torch

from halfbyte.errors import UsageError
from halfbyte.formats.codebooks import (
    DYNAMIC_MAP,
    FOUR_BIT_CODEBOOKS,
    FP4,
    INT4,
    INT4_AFFINE,
    NF4,
    find_codebook,
)


def test_nf4_is_quantiles_of_the_normal_distribution() -> None:
    """8 positive and 7 negative values at evenly spaced probabilities, scaled to [-1, 1], and 0."""
    tail = (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(0.5 + (0.5 - tail) * i / 8) for i in range(1, 9)]
    negative = [-quantile(0.5 + (0.5 - tail) * i / 7) for i in range(1, 8)]
    derived = sorted(v / positive[-1] for v in (*negative, 0.0, *positive))
    assert max(abs(a - b) for a, b in zip(NF4.values, derived, strict=True)) < 1.93e-7


def test_fp4_is_a_sign_two_exponent_bits_and_a_mantissa_bit() -> None:
    """In units of 1/12: exponent 0 is subnormal, 0 or 1/16; the others are 1.m * 2^e as coded."""
    scale_of_exponent = {1: 8, 2: 4, 3: 2}
    for code, value in enumerate(FP4.values):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        magnitude = mantissa / 16
        if exponent > 0:
            magnitude = scale_of_exponent[exponent] * (1 + mantissa / 2)
        assert value == (-1) ** sign * magnitude / 12


def test_int4_has_15_evenly_spaced_levels_and_one_unused() -> None:
    assert INT4.values[8] == 0
    assert INT4.values[15] == 1
    assert INT4.values[1] == -1
    steps = [b - a for a, b in itertools.pairwise(INT4.values)]
    assert steps == pytest.approx([1 / 7] * 15)
    assert INT4.max_gap == pytest.approx(1 / 7)
    assert INT4_AFFINE.values == tuple(range(16))


def test_dynamic_map_is_middles_of_cut_decades() -> None:
    derived = [0.0, 1.0]
    for i in range(7):
        borders = [0.1 + 0.9 * k / 2**i for k in range(2**i + 1)]
        middles = [(a + b) / 2 * 10 ** (i - 6) for a, b in itertools.pairwise(borders)]
        derived += middles + [-middle for middle in middles]
    assert sorted(derived) == pytest.approx(DYNAMIC_MAP.values, rel=2e-7)
    assert len(DYNAMIC_MAP.values) == 256
    assert list(DYNAMIC_MAP.values) == sorted(DYNAMIC_MAP.values)
    assert (DYNAMIC_MAP.values[0], DYNAMIC_MAP.values[-1]) == (-0.99296874, 1.0)


def test_dynamic_map_holds_the_bits_of_bitsandbytes() -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    theirs = oracle.create_dynamic_map()
    assert torch.equal(DYNAMIC_MAP.table().view(torch.int32), theirs.view(torch.int32))


def test_largest_gaps() -> None:
    assert NF4.max_gap == 1 - 0.6961928009986877
    assert FP4.max_gap == pytest.approx(4 / 12)
    assert DYNAMIC_MAP.max_gap == pytest.approx(0.0140625, rel=1e-5)


def test_tables_are_made_once() -> None:
    assert NF4.table() is NF4.table("cpu")
    assert NF4.table().dtype == torch.float32


def test_names() -> None:
    for name, book in FOUR_BIT_CODEBOOKS.items():
        assert find_codebook(name) is book
        assert find_codebook(book) is book
    with pytest.raises(UsageError, match="unknown codebook 'nf5'; known 4-bit codebooks: nf4, fp4"):
        find_codebook("nf5")

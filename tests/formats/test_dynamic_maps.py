"""The stored 8-bit maps against their derivation, and against bitsandbytes."""

import itertools

import pytest
import torch

from halfbyte.formats.codebooks import DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP, Codebook


def derived(*, signed: bool) -> list[float]:
    """Middles of the steps of seven decades; a decade has twice the steps of the one below."""
    values = [0.0, 1.0]
    for decade in range(7):
        steps = 2 ** (decade + (not signed))
        edges = [0.1 + 0.9 * step / steps for step in range(steps + 1)]
        middles = [10.0 ** (decade - 6) * (a + b) / 2 for a, b in itertools.pairwise(edges)]
        values += middles
        values += [-middle for middle in middles] if signed else []
    return sorted(values)


@pytest.mark.parametrize(
    ("codebook", "signed"), [(DYNAMIC_MAP, True), (UNSIGNED_DYNAMIC_MAP, False)]
)
def test_the_maps_are_what_they_are_derived_from(codebook: Codebook, signed: bool) -> None:
    stored = codebook.values
    assert len(stored) == len(set(stored)) == 256
    assert list(stored) == sorted(stored)
    # float32 arithmetic in the original: a linspace, a mean and a product, each rounded.
    for a, b in zip(stored, derived(signed=signed), strict=True):
        assert a == pytest.approx(b, rel=4 * 2**-24)


@pytest.mark.parametrize(
    ("codebook", "signed"), [(DYNAMIC_MAP, True), (UNSIGNED_DYNAMIC_MAP, False)]
)
def test_the_maps_are_those_of_bitsandbytes(codebook: Codebook, signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(codebook.table(), functional.create_dynamic_map(signed=signed))

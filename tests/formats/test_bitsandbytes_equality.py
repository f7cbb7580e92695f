"""Codes and scales against bitsandbytes itself, bit for bit."""

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.formats.codebooks import FP4, NF4, find_codebook

bitsandbytes = pytest.importorskip("bitsandbytes.functional")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def midpoints_and_neighbours(name: str) -> Tensor:
    values = torch.tensor(sorted(find_codebook(name).values))
    middles = (values[:-1] + values[1:]) / 2
    exact = torch.cat((values, middles))
    up, down = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    return torch.cat((exact, exact.nextafter(up), exact.nextafter(down))).clamp(-1, 1)


def every_boundary(name: str, scale: float) -> Tensor:
    """Blocks that hold 1, so that the rest of each keeps its value, times a scale."""
    probes = midpoints_and_neighbours(name)
    probes = torch.nn.functional.pad(probes, (0, -probes.numel() % 63))
    blocks = torch.nn.functional.pad(probes.view(-1, 63), (1, 0), value=1.0)
    return blocks.reshape(-1) * scale


def assert_same_bits(x: Tensor, name: str, block_size: int) -> None:
    ours = hb.quantize(x, name, block_size=block_size, double_quant=False)
    codes, state = bitsandbytes.quantize_4bit(
        x, quant_type=name, blocksize=block_size, compress_statistics=False
    )
    assert torch.equal(ours.scales, state.absmax)
    assert torch.equal(ours.codes, codes.reshape(-1))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 128, 1024, 4096])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 4096, 10_001, 100_000])
def test_random_normals(name: str, dtype: torch.dtype, block_size: int, count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    assert_same_bits(x, name, block_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [64, 128, 4096])
def test_ten_million_normals(name: str, dtype: torch.dtype, block_size: int) -> None:
    x = torch.randn(10_000_001, generator=torch.Generator().manual_seed(7)).to(dtype)
    assert_same_bits(x, name, block_size)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.02, 3.0, 2.0**-20, 2.0**15])
def test_every_value_midpoint_and_neighbour(name: str, dtype: torch.dtype, scale: float) -> None:
    assert_same_bits(every_boundary(name, scale).to(dtype), name, 64)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("exponent", [-126, -125, -100, 100, 126, 127])
def test_extreme_scales(name: str, exponent: int) -> None:
    assert_same_bits(every_boundary(name, 2.0**exponent), name, 64)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("count", [1, 64, 65, 100, 256])
def test_zeros(name: str, count: int) -> None:
    assert_same_bits(torch.zeros(count), name, 64)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_one_huge_outlier(name: str) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x[500] = 1e30
    assert_same_bits(x, name, 64)


def test_tables_hold_the_bits_of_bitsandbytes() -> None:
    for book in (NF4, FP4):
        theirs = bitsandbytes.get_4bit_type(book.name, device="cpu")
        assert torch.equal(book.table().view(torch.int32), theirs.view(torch.int32))

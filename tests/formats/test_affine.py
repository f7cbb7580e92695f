"""INT4 with zero-points: what its definition promises."""

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.formats.affine import encode_affine


def vector(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count))


CASES = [
    pytest.param(vector(1000), id="normal"),
    pytest.param(vector(65).abs(), id="positive"),
    pytest.param(vector(1), id="one"),
    pytest.param(vector(129) + 1000, id="far from zero"),
    pytest.param(1000 + vector(64) * 1e-4, id="a few units in the last place"),
    pytest.param(vector(200) * 1e38, id="huge"),
    pytest.param(torch.tensor([3.4e38, -3.4e38] * 32), id="the whole range"),
    pytest.param(vector(200) * 1e-40, id="subnormal"),
    pytest.param(torch.cat((torch.zeros(64), vector(64))), id="a block of zeros"),
]


@pytest.mark.parametrize("x", CASES)
def test_error_bound(x: Tensor) -> None:
    q = hb.quantize(x, "int4_affine", double_quant=False)
    error = (q.dequantize().double() - x.double()).abs()
    scales = q.scales.double().repeat_interleave(64)[: x.numel()]
    # Half a step; where zero is far away, codes and zero-point are large numbers that nearly
    # cancel: at most six roundings of magnitude |x|.
    padded = torch.nn.functional.pad(x.double(), (0, -x.numel() % 64)).view(-1, 64)
    magnitude = padded.abs().amax(dim=1).repeat_interleave(64)[: x.numel()]
    assert (error <= scales / 2 + 6 * 2.0**-24 * magnitude + 16 * 2.0**-149).all()


@pytest.mark.parametrize("value", [0.0, 3.7, -3.7, 1e-30, -3e38, 2.0**-149])
@pytest.mark.parametrize("count", [1, 63, 64, 65])
def test_constants_survive(value: float, count: int) -> None:
    x = torch.full((count,), value)
    assert torch.equal(hb.quantize(x, "int4_affine", double_quant=False).dequantize(), x)


def test_the_ends_of_a_block_are_its_outer_levels() -> None:
    x = torch.arange(16.0).repeat(4) * 2 - 7
    codes, scales, zero_points = encode_affine(x, 64)
    assert scales.tolist() == [2.0]
    assert zero_points.tolist() == [3.5]
    assert codes.tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4


def test_padding_does_not_widen_the_range() -> None:
    x = torch.linspace(5, 6, 65)
    _, scales, _ = encode_affine(x, 64)
    assert scales[1] == 6  # the last block holds one value: a constant


@pytest.mark.parametrize("double_quant", [False, True])
def test_empty(double_quant: bool) -> None:
    q = hb.quantize(torch.empty(0, 5), "int4_affine", double_quant=double_quant)
    assert q.dequantize().shape == (0, 5)
    assert q.zero_points is not None
    assert q.zero_points.numel() == 0


def test_double_quantized_zero_points() -> None:
    x = vector(4096)
    plain = hb.quantize(x, "int4_affine", double_quant=False)
    double = hb.quantize(x, "int4_affine")
    assert torch.equal(plain.codes, double.codes)
    assert plain.zero_points is not None
    assert double.zero_points is not None
    spread = (plain.zero_points - plain.zero_points.mean()).abs().max()
    assert (plain.zero_points - double.zero_points).abs().max() <= spread * 0.00704 + 1e-5
    assert double.bits_per_element == pytest.approx(4 + 2 * (8 / 64 + 64 / 4096), abs=1e-9)

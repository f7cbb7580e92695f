"""The value object: sizes, conversions, and every way it refuses to be built."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.errors import FormatError
from halfbyte.formats.codebooks import DYNAMIC_MAP, INT4_AFFINE, NF4, Codebook, find_codebook
from halfbyte.formats.ops import dequantize_4bit_reference, quantize_4bit_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


# Storage.


@pytest.mark.parametrize(
    ("book", "double_quant", "bits"),
    [
        ("nf4", True, "4.127"),
        ("nf4", False, "4.500"),
        ("fp4", True, "4.127"),
        ("fp4", False, "4.500"),
        ("int4", True, "4.127"),
        ("int4", False, "4.500"),
        ("int4_affine", True, "4.254"),
        ("int4_affine", False, "5.000"),
    ],
)
def test_bits_of_a_4096_by_4096_weight(book: str, double_quant: bool, bits: str) -> None:
    # Sizes alone: codes and scales are made, nothing is quantized.
    num_blocks = 4096 * 4096 // 64
    scales: Any = torch.ones(num_blocks)
    if double_quant:
        scales = hb.DoubleQuantized(torch.zeros(num_blocks).byte(), torch.ones(1024), 0.0)
    q = hb.QuantizedTensor(
        torch.zeros(4096 * 4096 // 2, dtype=torch.uint8),
        scales,
        find_codebook(book),
        64,
        torch.Size((4096, 4096)),
        torch.bfloat16,
        scales if book == "int4_affine" else None,
    )
    assert f"{q.bits_per_element:.3f}" == bits
    assert f"bits_per_element={bits}" in repr(q)


def test_a_real_weight_takes_what_was_said() -> None:
    q = hb.quantize(weight(512, 512))
    assert q.nbytes == 512 * 512 // 2 + 4096 + 16 * 4 + 4
    assert q.numel == 512 * 512
    assert q.double_quantized
    assert repr(q) == (
        "QuantizedTensor(nf4, shape=[512, 512], dtype=float32, block_size=64, "
        f"double_quantized=True, bits_per_element={8 * q.nbytes / 512**2:.3f}, device=cpu)"
    )


def test_an_empty_tensor() -> None:
    q = hb.quantize(torch.empty(3, 0))
    assert (q.bits_per_element, q.numel, q.dequantize().shape) == (0.0, 0, (3, 0))


# Values.


@pytest.mark.parametrize("book", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(1,), (7, 11), (33, 100), ()], ids=str)
def test_error_bound(
    book: str, dtype: torch.dtype, block_size: int, shape: tuple[int, ...]
) -> None:
    x = weight(*shape).to(dtype)
    q = hb.quantize(x, book, block_size=block_size, double_quant=False)
    error = (q.dequantize(dtype=torch.float32).double() - x.double()).abs().reshape(-1)
    scales = q.scales.double().repeat_interleave(block_size)[: x.numel()]
    # Half the largest step, and the roundings of quotient and product.
    assert (error <= scales * (q.codebook.max_gap / 2 + 2.0**-22)).all()
    # Asking for a dtype is rounding float32 once.
    assert torch.equal(q.dequantize(), q.dequantize(dtype=torch.float32).to(dtype))


@pytest.mark.parametrize("book", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("count", [1, 64, 1000])
def test_the_reference_is_what_runs(book: str, count: int) -> None:
    x, table = weight(count), find_codebook(book).table()
    for double_quant in (False, True):
        q = hb.quantize(x, book, double_quant=double_quant)
        codes, _ = quantize_4bit_reference(x, table, 64)
        assert torch.equal(q.codes, codes)
        out = torch.empty_like(x)
        dequantize_4bit_reference(*q.operator_arguments(), out)
        assert torch.equal(q.dequantize(), out)


def test_a_codebook_of_ones_own() -> None:
    book = Codebook("squares", tuple((i - 8) * abs(i - 8) / 64 for i in range(16)))
    x = torch.tensor(book.values).repeat(4)
    q = hb.quantize(x, book, double_quant=False)
    assert torch.equal(q.dequantize(), x)


@pytest.mark.parametrize("exponent", [-127, -135, -149])
@pytest.mark.parametrize("book", ["nf4", "fp4", "int4"])
def test_subnormal_scales_stay_accurate(book: str, exponent: int) -> None:
    """bitsandbytes writes zeros for these; the format has no reason to."""
    x = weight(640).clamp(-1, 1) * 2.0**exponent
    q = hb.quantize(x, book, double_quant=False)
    scales = q.scales.double().repeat_interleave(64)
    assert (q.scales > 0).all()
    error = (q.dequantize().double() - x.double()).abs()
    # The product is rounded to a multiple of the smallest subnormal.
    assert (error <= scales * (q.codebook.max_gap / 2 + 2.0**-22) + 2.0**-150).all()


def test_out() -> None:
    q = hb.quantize(weight(7, 9))
    out = torch.full((7, 9), torch.nan, dtype=torch.bfloat16)
    assert q.dequantize(out=out) is out
    assert torch.equal(out, q.dequantize(dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("out", "dtype", "found"),
    [
        (torch.empty(9, 7), None, r"found float32 \[9, 7\] on cpu"),
        (torch.empty(9, 7).T, None, r"found non-contiguous float32 \[7, 9\] on cpu"),
        (torch.empty(7, 9).double(), None, r"float32 or bfloat16 or float16 \[7, 9\] .* float64"),
        (torch.empty(7, 9).half(), torch.float32, r"contiguous float32 \[7, 9\] .* found float16"),
        (
            torch.empty(7, 9, device="meta"),
            None,
            r"on cpu expected, found float32 \[7, 9\] on meta",
        ),
    ],
)
def test_out_that_does_not_fit(out: Tensor, dtype: torch.dtype | None, found: str) -> None:
    with pytest.raises(FormatError, match=found):
        hb.quantize(weight(7, 9)).dequantize(dtype=dtype, out=out)


def test_dtypes_to_decode_to() -> None:
    with pytest.raises(FormatError, match=r"contiguous float64 \[7, 9\] on cpu expected|float32"):
        hb.quantize(weight(7, 9)).dequantize(dtype=torch.float64)


@pytest.mark.parametrize("book", ["nf4", "int4_affine"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_to(book: str, double_quant: bool) -> None:
    q = hb.quantize(weight(7, 9), book, double_quant=double_quant)
    half = q.to(dtype=torch.float16)
    assert torch.equal(half.dequantize(), q.dequantize().half())
    away = q.to("meta")
    assert (away.device.type, away.scales.device.type, away.dtype) == ("meta", "meta", q.dtype)


def test_gradients_stop() -> None:
    x = weight(64).requires_grad_()
    assert not hb.quantize(x).scales.requires_grad


# Refusals.


def test_zero_points_have_no_kernels() -> None:
    with pytest.raises(FormatError, match="int4_affine has no kernels: dequantize first"):
        hb.quantize(weight(64), "int4_affine").operator_arguments()


@pytest.mark.parametrize("block_size", [0, 16, 65, 8192, 64.0, "64", True])
def test_block_sizes(block_size: Any) -> None:
    with pytest.raises(FormatError, match="block_size: a power of two from 32 to 4096 expected"):
        hb.quantize(weight(64), block_size=block_size)


@pytest.mark.parametrize(
    "x", [torch.ones(3).double(), torch.ones(3).int(), torch.ones(3, 3).to_sparse()], ids=str
)
def test_dtypes_and_layouts(x: Tensor) -> None:
    message = "q_proj: a dense tensor of float32, bfloat16, float16 expected, found"
    with pytest.raises(FormatError, match=message):
        hb.quantize(x, name="q_proj")


@pytest.mark.parametrize("book", ["nf4", "fp4", "int4", "int4_affine"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite(book: str, value: float, dtype: torch.dtype) -> None:
    x = weight(5, 70).to(dtype)
    x[3, 69] = value
    x[4, 1] = value
    with pytest.raises(FormatError) as caught:
        hb.quantize(x, book, name="layers.0.q_proj")
    assert str(caught.value).startswith(
        f"layers.0.q_proj holds 2 NaN or infinite values of 350; the first is {value} "
        "at index [3, 69]"
    )


def test_a_scalar_that_is_not_finite() -> None:
    with pytest.raises(FormatError, match=r"the first is nan at index \[\]"):
        hb.quantize(torch.tensor(torch.nan))


def test_all_faults_at_once() -> None:
    q = hb.quantize(weight(7, 9), double_quant=False)
    with pytest.raises(FormatError) as caught:
        replace(
            q,
            codes=torch.zeros(5, device="meta"),
            dtype=torch.float64,
            codebook=DYNAMIC_MAP,
            stored_scales=torch.ones(3),
            stored_zero_points=torch.ones(1),
        )
    assert caught.value.problems == (
        "codes: uint8 [32] expected for shape [7, 9], found float32 [5]",
        "dtype: one of float32, bfloat16, float16 expected, found float64",
        "codebook: 16 values expected, found 256",
        "zero-points are not expected with codebook dynamic8",
        "scales: float32 [1] expected, found float32 [3]",
        "codes are on meta, scales on cpu",
        "codes are on meta, zero_points on cpu",
    )


def test_faults_of_blocks() -> None:
    q = hb.quantize(weight(7, 9))
    with pytest.raises(FormatError, match="block_size: a power of two"):
        replace(q, block_size=63)
    with pytest.raises(FormatError, match="zero-points are expected with codebook int4_affine"):
        replace(q, codebook=INT4_AFFINE)
    short = hb.DoubleQuantized(torch.ones(2).byte(), torch.ones(1), 0.0)
    with pytest.raises(FormatError, match=r"scales: uint8 \[1\] expected, found uint8 \[2\]"):
        replace(q, stored_scales=short)
    assert q.codebook == NF4

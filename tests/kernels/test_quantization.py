"""Native quantization and dequantization against the reference bodies, bit for bit."""

import math

import pytest
import torch
from torch import Tensor

from halfbyte.formats import ops
from halfbyte.formats.codebooks import DYNAMIC_MAP, FP4, INT4, NF4, Codebook
from halfbyte.formats.double_quantization import double_quantize

native = torch.ops.halfbyte
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTS = [0, 1, 2, 31, 33, 64, 65, 127, 1000, 4096, 10_001]
DUPLICATES = Codebook("duplicates", (0.5, -1.0, 0.5, 0.25, 1.0, -1.0, 0.0, *([0.125] * 9)))

INFINITY, NAN = float("inf"), float("nan")


def normals(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed + count)).to(dtype)


def assert_same_bits(ours: Tensor, reference: Tensor) -> None:
    """Equal bits, except that any NaN equals any NaN."""
    assert ours.dtype == reference.dtype
    assert ours.shape == reference.shape
    if ours.is_floating_point():
        assert torch.equal(ours.isnan(), reference.isnan())
        integer = torch.int32 if ours.dtype == torch.float32 else torch.int16
        ours = torch.where(ours.isnan(), 0, ours).view(integer)
        reference = torch.where(reference.isnan(), 0, reference).view(integer)
    assert torch.equal(ours, reference)


def check_quantize_4bit(x: Tensor, book: Codebook, block_size: int) -> None:
    arguments = (x, book.table(), block_size)
    for ours, reference in zip(
        native.quantize_4bit(*arguments), ops.quantize_4bit_reference(*arguments), strict=True
    ):
        assert_same_bits(ours, reference)


def check_dequantize_4bit(
    codes: Tensor, book: Codebook, scales: tuple[object, ...], block_size: int, count: int
) -> None:
    for dtype in DTYPES:
        ours, reference = torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)
        native.dequantize_4bit(codes, book.table(), *scales, block_size, ours)
        ops.dequantize_4bit_reference(codes, book.table(), *scales, block_size, reference)
        assert_same_bits(ours, reference)


def plain(scales: Tensor) -> tuple[object, ...]:
    return (scales, None, None, 0.0, 0)


def random_codes(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, ((count + 1) // 2,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("book", [NF4, FP4, INT4, DUPLICATES], ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
def test_quantize_4bit(isa: str, book: Codebook, dtype: torch.dtype, block_size: int) -> None:
    for count in COUNTS:
        check_quantize_4bit(normals(count, dtype), book, block_size)


@pytest.mark.parametrize("book", [NF4, FP4], ids=lambda b: b.name)
@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, -125, -20, 0, 60, 126, 127])
def test_quantize_4bit_at_every_boundary(isa: str, book: Codebook, exponent: int) -> None:
    values = torch.tensor(sorted(book.values))
    exact = torch.cat((values, (values[:-1] + values[1:]) / 2))
    up, down = torch.tensor(INFINITY), torch.tensor(-INFINITY)
    probes = torch.cat((exact, exact.nextafter(up), exact.nextafter(down))).clamp(-1, 1)
    probes = torch.nn.functional.pad(probes, (0, -probes.numel() % 63)).view(-1, 63)
    blocks = torch.nn.functional.pad(probes, (1, 0), value=1.0)
    check_quantize_4bit((blocks.double() * 2.0**exponent).float().reshape(-1), book, 64)


@pytest.mark.parametrize("bad", [NAN, -NAN, INFINITY, -INFINITY, 1e38, 1e-45, -0.0])
@pytest.mark.parametrize("count", [64, 65, 200])
def test_quantize_4bit_of_unusual_values(isa: str, bad: float, count: int) -> None:
    for position in (0, count // 2, count - 1):
        x = normals(count)
        x[position] = bad
        check_quantize_4bit(x, NF4, 64)
        check_quantize_4bit(torch.full((count,), bad), FP4, 64)


@pytest.mark.parametrize("count", [1, 64, 65, 96, 127])
def test_quantize_4bit_of_zeros(isa: str, count: int) -> None:
    check_quantize_4bit(torch.zeros(count), NF4, 64)
    check_quantize_4bit(-torch.zeros(count), FP4, 64)


def test_quantize_reads_strided_input_in_row_major_order(isa: str) -> None:
    x = normals(60 * 50).view(60, 50)
    for view in (x.T, x[:, ::3], x[5:, 7:], x[:1].expand(9, 50)):
        check_quantize_4bit(view, NF4, 64)
        ours = native.quantize_8bit(view, DYNAMIC_MAP.table(), 32)
        reference = ops.quantize_8bit_reference(view, DYNAMIC_MAP.table(), 32)
        assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


@pytest.mark.parametrize("book", [NF4, FP4, INT4], ids=lambda b: b.name)
@pytest.mark.parametrize("block_size", [32, 64, 512, 4096])
def test_dequantize_4bit(isa: str, book: Codebook, block_size: int) -> None:
    for count in COUNTS:
        scales = normals(-(-count // block_size), seed=1)  # negative ones, too
        check_dequantize_4bit(random_codes(count), book, plain(scales), block_size, count)


UNUSUAL_SCALES = [0.0, -0.0, 1e-45, 1e-40, 2.0**-126, 2.0**-120, 1e-30, 6e-5, 7e4, 3.3895e38]


@pytest.mark.parametrize("book", [NF4, FP4], ids=lambda b: b.name)
def test_dequantize_4bit_with_unusual_scales(isa: str, book: Codebook) -> None:
    # Subnormal products, and those that overflow 16 bits, are rounded and not flushed.
    magnitudes = torch.tensor([*UNUSUAL_SCALES, math.nan, math.inf])
    dense = torch.tensor([math.ldexp(1.1, exponent) for exponent in range(-149, 128)])
    scales = torch.cat((magnitudes, -magnitudes, dense))
    codes = torch.arange(256, dtype=torch.uint8).repeat(-(-scales.numel() * 32 // 256))
    codes = codes[: scales.numel() * 32]
    check_dequantize_4bit(codes, book, plain(scales), 64, scales.numel() * 64)


@pytest.mark.parametrize("nested_block_size", [1, 3, 256, 300, 2**40])
@pytest.mark.parametrize("count", [0, 1, 65, 20_000, 64 * 1000 + 5])
def test_dequantize_4bit_with_double_quantized_scales(
    isa: str, nested_block_size: int, count: int
) -> None:
    num_scales = -(-count // 64)
    length = min(nested_block_size, max(1, num_scales))
    double = double_quantize(normals(num_scales).abs(), block_size=length)
    codes, table = random_codes(count), DYNAMIC_MAP.table()
    nested = (double.codes, table, double.scales, double.offset, nested_block_size)
    scales = table[double.codes.long()]
    scales *= double.scales.repeat_interleave(length)[: scales.numel()]
    scales += double.offset
    for dtype in DTYPES:
        ours, reference = torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)
        native.dequantize_4bit(codes, NF4.table(), *nested, 64, ours)
        ops.dequantize_4bit_reference(codes, NF4.table(), *plain(scales), 64, reference)
        assert_same_bits(ours, reference)


def test_dequantize_4bit_writes_its_output_and_nothing_else(isa: str) -> None:
    for count in (1, 37, 64, 97):
        for dtype in DTYPES:
            around = torch.full((count + 64,), 7.0, dtype=dtype)
            out = around[32 : 32 + count]
            scales = normals(-(-count // 64))
            native.dequantize_4bit(random_codes(count), NF4.table(), *plain(scales), 64, out)
            assert torch.all(around[:32] == 7)
            assert torch.all(around[32 + count :] == 7)


def check_8bit(x: Tensor, book: Codebook, block_size: int) -> None:
    table = book.table()
    codes, scales = native.quantize_8bit(x, table, block_size)
    # The reference pads to whole blocks: a huge one is the same as one block of everything.
    length = min(block_size, max(1, x.numel()))
    expected_codes, expected_scales = ops.quantize_8bit_reference(x, table, length)
    assert_same_bits(codes, expected_codes)
    assert_same_bits(scales, expected_scales)
    for dtype in DTYPES:
        ours, reference = torch.empty(x.numel(), dtype=dtype), torch.empty(x.numel(), dtype=dtype)
        native.dequantize_8bit(codes, table, scales, block_size, ours)
        ops.dequantize_8bit_reference(codes, table, scales, length, reference)
        assert_same_bits(ours, reference)


LINEAR_MAP = Codebook("linear8", tuple((i - 127) / 128 for i in range(256)))
COARSE_MAP = Codebook("coarse8", (*([-1.0] * 100), *([0.0] * 56), *([0.5] * 50), *([1.0] * 50)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 7, 32, 100, 256, 2048, 2**40])
def test_8bit(isa: str, dtype: torch.dtype, block_size: int) -> None:
    for count in COUNTS:
        check_8bit(normals(count, dtype), DYNAMIC_MAP, block_size)


@pytest.mark.parametrize("book", [LINEAR_MAP, COARSE_MAP], ids=lambda b: b.name)
def test_8bit_with_other_tables(isa: str, book: Codebook) -> None:
    for count in COUNTS:
        check_8bit(normals(count), book, 256)


@pytest.mark.parametrize(
    "absmax", [1.0, 0.3, 3e-5, 1e-38, 2.0**-126, 2.0**-149, 1e38, 2.0**125, 2.0**127]
)
def test_8bit_nearest_is_exact_at_every_boundary(isa: str, absmax: float) -> None:
    middles = (DYNAMIC_MAP.table()[:-1].double() + DYNAMIC_MAP.table()[1:].double()) / 2
    exact = (middles * absmax).float()
    up, down = torch.tensor(INFINITY), torch.tensor(-INFINITY)
    edges = torch.cat((exact, exact.nextafter(up), exact.nextafter(down)))
    for tops in (absmax, -absmax):
        check_8bit(torch.cat((torch.tensor([tops]), edges)), DYNAMIC_MAP, 4096)


def test_8bit_of_values_over_all_magnitudes(isa: str) -> None:
    x = torch.ldexp(normals(40_000), torch.randint(-40, 1, (40_000,)))
    check_8bit(x, DYNAMIC_MAP, 256)
    check_8bit(x * 1e-30, DYNAMIC_MAP, 256)


@pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY, 0.0, 1e-45, 3e38])
def test_8bit_of_unusual_values(isa: str, bad: float) -> None:
    x = normals(600)
    x[300] = bad
    check_8bit(x, DYNAMIC_MAP, 256)
    check_8bit(torch.full((70,), bad), DYNAMIC_MAP, 64)


def test_threads_do_not_change_a_bit(isa: str) -> None:
    x = normals(300_001)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            codes, scales = native.quantize_4bit(x, NF4.table(), 64)
            out = torch.empty(x.numel(), dtype=torch.bfloat16)
            native.dequantize_4bit(codes, NF4.table(), *plain(scales), 64, out)
            codes8, scales8 = native.quantize_8bit(x, DYNAMIC_MAP.table(), 256)
            back = torch.empty(x.numel())
            native.dequantize_8bit(codes8, DYNAMIC_MAP.table(), scales8, 256, back)
            results.append((codes, scales, out, codes8, scales8, back))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)

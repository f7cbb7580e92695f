"""Eight bits for a scale: against exact arithmetic, and against bitsandbytes."""

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.errors import FormatError
from halfbyte.formats.codebooks import DYNAMIC_MAP, NF4
from halfbyte.formats.double_quantization import DoubleQuantized, double_quantize
from halfbyte.formats.ops import dequantize_8bit_reference, quantize_8bit_reference


def vector(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def scales_of_weights(count: int) -> Tensor:
    return vector(count * 64).view(count, 64).abs().amax(dim=1)


def worst_case() -> Tensor:
    """Middles of the map's largest steps, on both sides, in blocks whose mean is 0."""
    half = torch.tensor([1.0, 0.98593, 0.9719, 0.5, 1e-3, 1e-7] * 20)
    return torch.cat((half, -half, torch.zeros(16)))


@pytest.mark.parametrize("block_size", [1, 7, 256])
@pytest.mark.parametrize(
    "scales",
    [
        pytest.param(scales_of_weights(10_000), id="weights"),
        pytest.param(vector(1001), id="normal"),
        pytest.param(worst_case(), id="worst"),
        pytest.param(1 + 1e-6 * vector(300), id="nearly equal"),
        pytest.param(torch.full((300,), 0.3), id="equal"),
        pytest.param(vector(300) * 2.0**100, id="huge"),
        pytest.param(vector(300) * 2.0**-140, id="subnormal"),
        pytest.param(torch.tensor([5.0]), id="one"),
        pytest.param(torch.zeros(257), id="zeros"),
        pytest.param(torch.zeros(0), id="none"),
    ],
)
def test_error_bound(scales: Tensor, block_size: int) -> None:
    stored = double_quantize(scales, block_size=block_size)
    decoded = stored.dequantize().double()
    absmax = stored.scales.double().repeat_interleave(block_size)[: scales.numel()]
    # 0.00704 of the block, and three roundings: of the difference, the product, and the sum.
    rounding = 3 * 2.0**-24 * (scales.abs().double() + abs(stored.offset)) + 3 * 2.0**-149
    assert ((scales.double() - decoded).abs() <= absmax * 0.00704 + rounding).all()
    assert stored.nbytes == scales.numel() + 4 * -(-scales.numel() // block_size) + 4


def test_the_mean_of_scales_whose_sum_overflows() -> None:
    stored = double_quantize(torch.full((1000,), 3e38))
    assert stored.offset == torch.tensor(3e38).item()
    assert torch.equal(stored.dequantize(), torch.full((1000,), 3e38))


def test_second_level_codes_against_bitsandbytes() -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    scales = scales_of_weights(100_000)
    ours = double_quantize(scales)
    centred = scales - scales.mean()
    theirs, state = oracle.quantize_blockwise(centred, blocksize=256)
    assert ours.offset == scales.mean().item()
    assert torch.equal(ours.scales, state.absmax)
    assert_at_least_as_near(centred, ours.codes, theirs, state.absmax, 256)
    decoded = oracle.dequantize_blockwise(ours.codes, state)
    assert torch.equal(ours.dequantize(), decoded + ours.offset)


def assert_at_least_as_near(
    x: Tensor, ours: Tensor, theirs: Tensor, absmax: Tensor, block_size: int
) -> None:
    """bitsandbytes' CPU code takes the second-nearest entry now and then; ours never does."""
    differ = ours != theirs
    assert differ.double().mean() <= 0.003
    scale = absmax.double().repeat_interleave(block_size)[: x.numel()]
    table = DYNAMIC_MAP.table().double()
    errors = [(table[codes.long()] * scale - x.double()).abs() for codes in (ours, theirs)]
    assert (errors[0] <= errors[1]).all()


@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_8_bit_blocks_against_bitsandbytes(block_size: int) -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    x = vector(100_001)
    codes, scales = quantize_8bit_reference(x, DYNAMIC_MAP.table(), block_size)
    theirs, state = oracle.quantize_blockwise(x, blocksize=block_size)
    assert torch.equal(scales, state.absmax)
    assert_at_least_as_near(x, codes, theirs, scales, block_size)
    out = torch.empty_like(x)
    dequantize_8bit_reference(codes, DYNAMIC_MAP.table(), scales, block_size, out)
    assert torch.equal(out, oracle.dequantize_blockwise(codes, state))


def test_8_bit_codes_are_the_nearest_of_all_256() -> None:
    x = torch.cat((vector(2000), vector(500) * 1e-5, torch.tensor([0.0, -0.0, 7.0, -7.0])))
    codes, scales = quantize_8bit_reference(x, DYNAMIC_MAP.table(), 64)
    scale = scales.double().repeat_interleave(64)[: x.numel()]
    distances = (DYNAMIC_MAP.table().double() * scale[:, None] - x.double()[:, None]).abs()
    chosen = distances.gather(1, codes.long()[:, None])[:, 0]
    assert torch.equal(chosen, distances.amin(dim=1))


def test_8_bit_ties_take_the_lower_entry() -> None:
    table = torch.arange(256, dtype=torch.float32) / 256  # sums and halves of these are exact
    x = torch.cat(((table[:-1] + table[1:]) / 2, torch.ones(1)))
    codes, _ = quantize_8bit_reference(x, table, 256)
    assert torch.equal(codes[:-1], torch.arange(255, dtype=torch.uint8))


def test_zero_points_are_stored_likewise() -> None:
    zero_points = vector(1000) + 7.5
    stored = hb.double_quantize(zero_points)
    assert isinstance(stored, DoubleQuantized)
    spread = (zero_points - zero_points.mean()).abs().max()
    assert (stored.dequantize() - zero_points).abs().max() < spread * 0.00704 + 1e-5


def test_the_vector_is_not_modified_and_to_keeps_all() -> None:
    scales = scales_of_weights(10)
    before = scales.clone()
    stored = double_quantize(scales).to("cpu")
    assert torch.equal(scales, before)
    assert stored.codebook == DYNAMIC_MAP


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (
            torch.ones(3, dtype=torch.float64),
            r"scales: float32 \[M\] expected, found float64 \[3\]",
        ),
        (torch.ones(3, 1), r"scales: float32 \[M\] expected, found float32 \[3, 1\]"),
        (torch.tensor([1.0, torch.nan]), r"scales holds 1 NaN .* the first is nan at index \[1\]"),
        (torch.tensor([torch.inf]), r"the first is inf at index \[0\]"),
        (torch.tensor([3.4e38, -3.4e38, -3.4e38]), "scales: differ by more than float32 holds"),
    ],
)
def test_vectors_that_are_refused(scales: Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        double_quantize(scales)


@pytest.mark.parametrize("block_size", [0, -1])
def test_block_sizes_that_are_refused(block_size: int) -> None:
    with pytest.raises(FormatError, match=f"block_size: at least 1 expected, found {block_size}"):
        double_quantize(torch.ones(3), block_size=block_size)
    with pytest.raises(FormatError, match=f"block_size: at least 1 expected, found {block_size}"):
        DoubleQuantized(torch.ones(3).byte(), torch.ones(1), 0.0, block_size)


def test_all_faults_at_once() -> None:
    with pytest.raises(FormatError) as caught:
        DoubleQuantized(torch.ones(3, 1), torch.ones(2, device="meta"), 0.0, 256, NF4)
    assert caught.value.problems == (
        "codes: uint8 [M] expected, found float32 [3, 1]",
        "scales: float32 [1] expected, found float32 [2]",
        "codebook: 256 values expected, found 16",
        "codes are on cpu, scales on meta",
    )

"""Double quantization: the scales of a 4-bit tensor, quantized themselves.

One float32 scale a block of 64 costs half a bit a weight. Stored as 8-bit codes around their
mean, with one float32 a 256 scales, it costs 0.127 bits. Zero-points are treated likewise.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats import ops  # noqa: F401  (registers the operators)
from halfbyte.formats.checks import describe, require_finite
from halfbyte.formats.codebooks import DYNAMIC_MAP, Codebook

NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True, slots=True)
class DoubleQuantized:
    """A float32 vector held as 8-bit codes of the dynamic map around one offset.

    Attributes:
        codes: uint8 `[M]`.
        scales: float32 `[ceil(M / block_size)]`.
        offset: The mean of the vector; a value that float32 holds exactly.
        block_size: Entries that share a scale.
        codebook: What the codes stand for; files may bring a map that is rounded differently.
    """

    codes: Tensor
    scales: Tensor
    offset: float
    block_size: int = NESTED_BLOCK_SIZE
    codebook: Codebook = field(default=DYNAMIC_MAP, repr=False)

    def __post_init__(self) -> None:
        problems = []
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 1:
            problems.append(f"codes: uint8 [M] expected, found {describe(self.codes)}")
        if self.block_size < 1:
            problems.append(f"block_size: at least 1 expected, found {self.block_size}")
        else:
            expected = -(-self.codes.numel() // self.block_size)
            if self.scales.dtype != torch.float32 or tuple(self.scales.shape) != (expected,):
                problems.append(
                    f"scales: float32 [{expected}] expected, found {describe(self.scales)}"
                )
        if len(self.codebook.values) != len(DYNAMIC_MAP.values):
            problems.append(f"codebook: 256 values expected, found {len(self.codebook.values)}")
        if self.codes.device != self.scales.device:
            problems.append(f"codes are on {self.codes.device}, scales on {self.scales.device}")
        if problems:
            raise FormatError("not a double-quantized vector", problems=problems)

    @property
    def nbytes(self) -> int:
        """Bytes stored: a byte a code, 4 a scale and 4 for the offset."""
        return self.codes.numel() + 4 * self.scales.numel() + 4

    def dequantize(self) -> Tensor:
        """The vector, float32 `[M]`: `map[code] * scale + offset`, two roundings."""
        out = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        table = self.codebook.table(self.codes.device)
        torch.ops.halfbyte.dequantize_8bit(self.codes, table, self.scales, self.block_size, out)
        return out.add_(self.offset)

    def to(self, device: torch.device | str) -> "DoubleQuantized":
        """The same vector on another device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))


def double_quantize(scales: Tensor, *, block_size: int = NESTED_BLOCK_SIZE) -> DoubleQuantized:
    """Quantize a vector of scales (or zero-points) to 8 bits around its mean.

    The mean is subtracted in float32; each difference then takes the nearest entry of the
    dynamic map times its block's absmax, exactly; a tie takes the lower entry.

    Args:
        scales: float32 `[M]`. Not modified.
        block_size: Scales that share a second-level scale.

    Raises:
        FormatError: Not a float32 vector, it holds a NaN or an infinity, its values are too far
            apart for float32, or `block_size` is not positive.

    Error bound:
        |scale - decoded| <= absmax * 0.00704, absmax the largest |scale - mean| of the block: half
        the map's largest step (0.9930 to 1 below, 0.0141 between), plus three float32 roundings.

    Source:
        QLoRA, arXiv:2305.14314, double quantization.
    """
    if scales.dtype != torch.float32 or scales.dim() != 1:
        raise FormatError(f"scales: float32 [M] expected, found {describe(scales)}")
    if block_size < 1:
        raise FormatError(f"block_size: at least 1 expected, found {block_size}")
    require_finite(scales, "scales")
    offset = _mean(scales)
    codes, nested_scales = torch.ops.halfbyte.quantize_8bit(
        scales - offset, DYNAMIC_MAP.table(scales.device), block_size
    )
    if not torch.isfinite(nested_scales).all():
        raise FormatError(
            "scales: differ by more than float32 holds from their mean",
            hint="Store them without double quantization.",
        )
    return DoubleQuantized(codes, nested_scales, offset.item(), block_size)


def _mean(scales: Tensor) -> Tensor:
    # float32 as in bitsandbytes, so that both subtract the same bits; float64 where the float32
    # sum overflows.
    if not scales.numel():
        return scales.new_zeros(())
    mean = scales.mean()
    return mean if torch.isfinite(mean) else scales.double().mean().float()

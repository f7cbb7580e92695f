"""A tensor in 4 bits: codes, scales, and what is needed to read them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.affine import decode_affine, encode_affine
from halfbyte.formats.checks import (
    FLOAT_DTYPES,
    block_size_fault,
    describe,
    dtype_name,
    require_block_size,
    require_finite,
    require_float,
)
from halfbyte.formats.codebooks import INT4_AFFINE, NF4, Codebook, find_codebook
from halfbyte.formats.double_quantization import DoubleQuantized, double_quantize

DEFAULT_BLOCK_SIZE = 64

Dequantization = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float, int, int]
"""The arguments of the `dequantize_4bit` operator before `out`; `linear_4bit` takes them too."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """Codes and scales of a tensor with N elements, in blocks of S. Valid once built.

    Attributes:
        codes: uint8 `[ceil(N / 2)]`; the earlier element in the high nibble.
        stored_scales: float32 `[ceil(N / S)]`, or the same double-quantized.
        codebook: What the codes stand for, relative to the scale.
        block_size: S; consecutive elements in row-major order.
        shape: Of the tensor that was quantized.
        dtype: Of the tensor that was quantized, and of `dequantize()` unless told otherwise.
        stored_zero_points: As `stored_scales`, for the codebook `int4_affine` only.
    """

    codes: Tensor
    stored_scales: Tensor | DoubleQuantized
    codebook: Codebook
    block_size: int
    shape: torch.Size
    dtype: torch.dtype
    stored_zero_points: Tensor | DoubleQuantized | None = None

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise FormatError("not a 4-bit tensor", problems=problems)

    def _problems(self) -> list[str]:
        problems = []
        num_codes = (self.numel + 1) // 2
        if self.codes.dtype != torch.uint8 or tuple(self.codes.shape) != (num_codes,):
            problems.append(
                f"codes: uint8 [{num_codes}] expected for shape {list(self.shape)}, "
                f"found {describe(self.codes)}"
            )
        if self.dtype not in FLOAT_DTYPES:
            allowed = ", ".join(dtype_name(d) for d in FLOAT_DTYPES)
            problems.append(f"dtype: one of {allowed} expected, found {dtype_name(self.dtype)}")
        if len(self.codebook.values) != len(NF4.values):
            problems.append(f"codebook: 16 values expected, found {len(self.codebook.values)}")
        affine = self.codebook == INT4_AFFINE
        if affine != (self.stored_zero_points is not None):
            expected = "expected" if affine else "not expected"
            problems.append(f"zero-points are {expected} with codebook {self.codebook.name}")
        if fault := block_size_fault(self.block_size):
            return [*problems, fault]
        for name, stored in (
            ("scales", self.stored_scales),
            ("zero_points", self.stored_zero_points),
        ):
            problems += self._block_vector_problems(name, stored)
        return problems

    def _block_vector_problems(
        self, name: str, stored: Tensor | DoubleQuantized | None
    ) -> list[str]:
        if stored is None:
            return []
        if isinstance(stored, DoubleQuantized):
            vector, dtype = stored.codes, torch.uint8
        else:
            vector, dtype = stored, torch.float32
        expected = (-(-self.numel // self.block_size),)
        problems = []
        if vector.dtype != dtype or tuple(vector.shape) != expected:
            problems.append(
                f"{name}: {dtype_name(dtype)} {list(expected)} expected, found {describe(vector)}"
            )
        if vector.device != self.codes.device:
            problems.append(f"codes are on {self.codes.device}, {name} on {vector.device}")
        return problems

    @property
    def numel(self) -> int:
        """Number of elements, N."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the codes and scales are."""
        return self.codes.device

    @property
    def double_quantized(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return isinstance(self.stored_scales, DoubleQuantized)

    @property
    def scales(self) -> Tensor:
        """float32 `[ceil(N / S)]`, decoded if they are double-quantized."""
        return _decoded(self.stored_scales)

    @property
    def zero_points(self) -> Tensor | None:
        """float32 `[ceil(N / S)]` for `int4_affine`, else None."""
        return None if self.stored_zero_points is None else _decoded(self.stored_zero_points)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero-points as stored; tables are shared and not counted."""
        stored = (self.stored_scales, self.stored_zero_points)
        return self.codes.numel() + sum(s.nbytes for s in stored if s is not None)

    @property
    def bits_per_element(self) -> float:
        """Storage per element; 4.5 for blocks of 64, 4.127 when double-quantized."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    def dequantize(self, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The tensor in 16 or 32 bits.

        Each value is `table[code] * scale`, rounded once in float32 and once to the result.

        Args:
            dtype: float32, bfloat16 or float16; by default that of the original.
            out: Contiguous tensor of `shape` to write to, instead of a new one.

        Raises:
            FormatError: `out` does not fit.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        self._require_fitting(out, dtype)
        if self.stored_zero_points is not None:
            zero_points = _decoded(self.stored_zero_points)
            decode_affine(self.codes, self.scales, zero_points, self.block_size, out)
        else:
            torch.ops.halfbyte.dequantize_4bit(*self.operator_arguments(), out)
        return out

    def _require_fitting(self, out: Tensor, dtype: torch.dtype | None) -> None:
        allowed = FLOAT_DTYPES if dtype is None else (dtype,)
        if (
            out.shape != self.shape
            or out.dtype not in allowed
            or out.dtype not in FLOAT_DTYPES
            or out.device != self.device
            or not out.is_contiguous()
        ):
            names = " or ".join(dtype_name(d) for d in allowed)
            raise FormatError(
                f"out: contiguous {names} {list(self.shape)} on {self.device} expected, found "
                f"{'' if out.is_contiguous() else 'non-contiguous '}{describe(out)} on {out.device}"
            )

    def operator_arguments(self) -> Dequantization:
        """What operators that read the codes take, in their order.

        Raises:
            FormatError: The codebook has zero-points, which operators know nothing of.
        """
        if self.stored_zero_points is not None:
            raise FormatError(f"codebook {self.codebook.name} has no kernels: dequantize first")
        table = self.codebook.table(self.device)
        stored = self.stored_scales
        if isinstance(stored, DoubleQuantized):
            nested_table = stored.codebook.table(self.device)
            nested = (nested_table, stored.scales, stored.offset, stored.block_size)
            return (self.codes, table, stored.codes, *nested, self.block_size)
        return (self.codes, table, stored, None, None, 0.0, 0, self.block_size)

    def to(
        self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None
    ) -> "QuantizedTensor":
        """The same codes on another device, or with another dtype to dequantize to."""
        device = self.device if device is None else device
        zero_points = self.stored_zero_points
        return replace(
            self,
            codes=self.codes.to(device),
            stored_scales=self.stored_scales.to(device),
            stored_zero_points=None if zero_points is None else zero_points.to(device),
            dtype=dtype or self.dtype,
        )

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.codebook.name}, shape={list(self.shape)}, "
            f"dtype={dtype_name(self.dtype)}, block_size={self.block_size}, "
            f"double_quantized={self.double_quantized}, "
            f"bits_per_element={self.bits_per_element:.3f}, device={self.device})"
        )


def quantize(
    weight: Tensor,
    codebook: str | Codebook = "nf4",
    *,
    block_size: int = DEFAULT_BLOCK_SIZE,
    double_quant: bool = True,
    name: str = "weight",
) -> QuantizedTensor:
    """Quantize to 4 bits with one scale per block of consecutive elements.

    Elements are read in row-major order. Each block is divided by its largest magnitude, and
    each quotient becomes the code of the nearest codebook value; a tie takes the lower value.
    Two codes share a byte, the earlier one in the high nibble. The exact arithmetic is in
    `formats.ops`; for NF4 and FP4 it gives bitsandbytes' bits.

    Args:
        weight: Any shape with N elements; float32, bfloat16 or float16. Not modified.
        codebook: `nf4`, `fp4`, `int4`, `int4_affine`, or a `Codebook` of 16 values.
        block_size: Elements per scale, S. A power of two from 32 to 4096.
        double_quant: Store the scales in 8 bits (`double_quantize`).
        name: What to call the tensor in errors.

    Returns:
        4 + 32 / S bits per element, or 4 + 8 / S + 32 / (256 S) double-quantized.

    Raises:
        UsageError: Unknown codebook.
        FormatError: `block_size` or dtype is not allowed, or `weight` holds a NaN or an
            infinity. The message names the first such element.

    Error bound:
        |x - dequantize(q)| <= scale * codebook.max_gap / 2, element by element, before the
        scales are double-quantized and the result is rounded to its dtype.

    Source:
        QLoRA, arXiv:2305.14314, block-wise k-bit quantization.
    """
    book = find_codebook(codebook)
    require_block_size(block_size)
    require_float(weight, name)
    weight = weight.detach()
    zero_points: Tensor | None = None
    if book == INT4_AFFINE:
        require_finite(weight, name)
        codes, scales, zero_points = encode_affine(weight, block_size)
    else:
        table = book.table(weight.device)
        codes, scales = torch.ops.halfbyte.quantize_4bit(weight, table, block_size)
        if not torch.isfinite(scales).all():  # a NaN or infinity shows in its block's scale
            require_finite(weight, name)
    store = double_quantize if double_quant else _keep
    return QuantizedTensor(
        codes,
        store(scales),
        book,
        block_size,
        weight.shape,
        weight.dtype,
        None if zero_points is None else store(zero_points),
    )


def _keep(vector: Tensor) -> Tensor:
    return vector


def _decoded(stored: Tensor | DoubleQuantized) -> Tensor:
    return stored.dequantize() if isinstance(stored, DoubleQuantized) else stored

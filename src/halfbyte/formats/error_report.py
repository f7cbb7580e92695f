"""What quantization did to a tensor, and to a model: error, size, and the cost of each choice.

A report keeps sums, and derives every ratio from them. So the report of a model is the exact report
of all its elements together, not a mean of means, whatever the order and size of its tensors.

Symbols: w a weight, d the same decoded from 4 bits in its own dtype, all in float64.
    relative RMS error  sqrt(sum (w - d)^2 / sum w^2)
    SNR                 10 log10(sum w^2 / sum (w - d)^2), in decibels
    max error           max |w - d|
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.affine import encode_affine
from halfbyte.formats.checks import describe, require_finite, require_float
from halfbyte.formats.double_quantization import DoubleQuantized
from halfbyte.formats.ops import EMPTY_TAIL_SCALE
from halfbyte.formats.quantized_tensor import QuantizedTensor

CHUNK = 1 << 20
"""Elements looked at together, a multiple of every block size: 8 MiB an intermediate."""

DYNAMIC_MAP_STEP = 0.01412
"""Largest distance of neighbours in the dynamic map, rounded up: a decoded scale is within half of
this of the original, or within all of it where another writer took the second-nearest code."""

Record = dict[str, str | int | float | None]

COLUMNS = ("tensor", "parameters", "bits", "rel. RMS", "SNR dB", "max error", "DQ saves", "DQ adds")
"""Headings of `ErrorReport.cells`; DQ is double quantization."""


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """Size and error of one quantized tensor, or of several together.

    Attributes:
        name: Of the tensor.
        num_elements: N.
        original_bytes: Size before.
        nbytes: Size of codes, scales and zero-points.
        sum_squares: Of the weights.
        sum_squared_error: Of the differences.
        max_abs_error: Largest difference; 0.0 for no elements.
        saved_bytes: What double quantization saves; 0 where it is not used.
        sum_squared_error_before: With the same codes and the scales before double quantization; the
            same as `sum_squared_error` where it is not used, and None where those scales cannot be
            known, because they are not the block maxima of these weights.
    """

    name: str
    num_elements: int
    original_bytes: int
    nbytes: int
    sum_squares: float
    sum_squared_error: float
    max_abs_error: float
    saved_bytes: int
    sum_squared_error_before: float | None

    @property
    def bits_per_element(self) -> float:
        """Storage per element."""
        return 8 * self.nbytes / self.num_elements if self.num_elements else 0.0

    @property
    def relative_rms_error(self) -> float:
        """Norm of the error over norm of the weights; infinite where only the weights are zero."""
        return _relative(self.sum_squared_error, self.sum_squares)

    @property
    def snr_db(self) -> float:
        """Power of the weights over power of the error, in decibels; infinite without error."""
        relative = self.relative_rms_error
        return math.inf if relative == 0 else -20 * math.log10(relative)

    @property
    def double_quantization_error(self) -> float | None:
        """What double quantization adds to the relative RMS error; None where it is not known."""
        if self.sum_squared_error_before is None:
            return None
        before = _relative(self.sum_squared_error_before, self.sum_squares)
        return self.relative_rms_error - before if math.isfinite(before) else 0.0

    def cells(self) -> tuple[str, ...]:
        """The report as the row of a table under `COLUMNS`."""
        added = self.double_quantization_error
        return (
            self.name,
            f"{self.num_elements:,}",
            f"{self.bits_per_element:.3f}",
            f"{self.relative_rms_error:.3%}",
            f"{self.snr_db:.2f}",
            f"{self.max_abs_error:.3g}",
            f"{self.saved_bytes:,} B" if self.saved_bytes else "-",
            ("unknown" if added is None else f"{added:+.4%}") if self.saved_bytes else "-",
        )

    def to_json(self) -> Record:
        """Every figure; None for those that are infinite or not known."""
        return {
            "name": self.name,
            "num_elements": self.num_elements,
            "original_bytes": self.original_bytes,
            "bytes": self.nbytes,
            "bits_per_element": self.bits_per_element,
            "relative_rms_error": _finite(self.relative_rms_error),
            "snr_db": _finite(self.snr_db),
            "max_abs_error": self.max_abs_error,
            "double_quantization_saved_bytes": self.saved_bytes,
            "double_quantization_error": self.double_quantization_error,
            "sum_squares": self.sum_squares,
            "sum_squared_error": self.sum_squared_error,
        }

    def __str__(self) -> str:
        fields = zip(COLUMNS[1:], self.cells()[1:], strict=True)
        return f"{self.name}: " + ", ".join(f"{key} {value}" for key, value in fields)


@dataclass(frozen=True, slots=True)
class ModelErrorReport:
    """The reports of a model's tensors.

    Attributes:
        tensors: In the order of the model.
    """

    tensors: tuple[ErrorReport, ...]

    @property
    def total(self) -> ErrorReport:
        """All elements of all tensors as one report, named `all`."""
        return combine_reports(self.tensors, name="all")

    def to_json(self) -> dict[str, Record | list[Record]]:
        """Every tensor, and the total."""
        return {"total": self.total.to_json(), "tensors": [t.to_json() for t in self.tensors]}


def error_report(
    weight: Tensor, quantized: QuantizedTensor, *, name: str = "weight"
) -> ErrorReport:
    """Compare a tensor with its 4-bit form, a million elements at a time, in float64.

    What is compared is `quantized.dequantize()`, so the rounding of its dtype is part of the error.

    Args:
        weight: Before quantization; float32, bfloat16 or float16, N elements. Not modified.
        quantized: Of the same shape and on the same device.
        name: What to call the tensor in the report and in errors.

    Raises:
        FormatError: Shapes or devices differ, or `weight` is not a finite float tensor.
    """
    require_float(weight, name)
    if weight.shape != quantized.shape or weight.device != quantized.device:
        raise FormatError(
            f"{name}: {describe(weight)} on {weight.device} does not match its quantized form, "
            f"{list(quantized.shape)} on {quantized.device}"
        )
    require_finite(weight, name)
    flat = weight.detach().reshape(-1)
    before = _scales_before(flat, quantized) if quantized.double_quantized else None
    squares: list[float] = []
    errors: list[float] = []
    errors_before: list[float] = []
    largest = 0.0
    scales, zero_points = quantized.scales, quantized.zero_points
    for begin in range(0, flat.numel(), CHUNK):
        w = flat[begin : begin + CHUNK].double()
        error = w - _decode(quantized, begin, scales, zero_points)
        squares.append(float(w.dot(w)))
        errors.append(float(error.dot(error)))
        largest = max(largest, float(error.abs().max()))
        if before is not None:
            error = w - _decode(quantized, begin, *before)
            errors_before.append(float(error.dot(error)))
    sum_before: float | None = math.fsum(errors)
    if quantized.double_quantized:
        sum_before = None if before is None else math.fsum(errors_before)
    return ErrorReport(
        name=name,
        num_elements=flat.numel(),
        original_bytes=flat.numel() * flat.element_size(),
        nbytes=quantized.nbytes,
        sum_squares=math.fsum(squares),
        sum_squared_error=math.fsum(errors),
        max_abs_error=largest,
        saved_bytes=sum(_saved(vector) for vector in _stored(quantized)),
        sum_squared_error_before=sum_before,
    )


def combine_reports(reports: Iterable[ErrorReport], *, name: str) -> ErrorReport:
    """The report of all elements together: sums of sums, the largest of the largest."""
    reports = tuple(reports)
    before = [r.sum_squared_error_before for r in reports]
    known = [b for b in before if b is not None]
    return ErrorReport(
        name=name,
        num_elements=sum(r.num_elements for r in reports),
        original_bytes=sum(r.original_bytes for r in reports),
        nbytes=sum(r.nbytes for r in reports),
        sum_squares=math.fsum(r.sum_squares for r in reports),
        sum_squared_error=math.fsum(r.sum_squared_error for r in reports),
        max_abs_error=max((r.max_abs_error for r in reports), default=0.0),
        saved_bytes=sum(r.saved_bytes for r in reports),
        sum_squared_error_before=math.fsum(known) if len(known) == len(before) else None,
    )


def _decode(
    quantized: QuantizedTensor, begin: int, scales: Tensor, zero_points: Tensor | None
) -> Tensor:
    """Elements from `begin`, at most `CHUNK`, with these scales; float64."""
    end = min(begin + CHUNK, quantized.numel)
    size = quantized.block_size
    blocks = slice(begin // size, -(-end // size))
    part = QuantizedTensor(
        quantized.codes[begin // 2 : (end + 1) // 2],
        scales[blocks],
        quantized.codebook,
        size,
        torch.Size([end - begin]),
        quantized.dtype,
        None if zero_points is None else zero_points[blocks],
    )
    return part.dequantize().double()


def _scales_before(flat: Tensor, quantized: QuantizedTensor) -> tuple[Tensor, Tensor | None] | None:
    """Scales and zero-points of these weights, if they are those that were double-quantized."""
    found = [_block_scales(chunk, quantized) for chunk in flat.split(CHUNK)] if flat.numel() else []
    scales = torch.cat([s for s, _ in found]) if found else flat.new_empty(0, dtype=torch.float32)
    points = [z for _, z in found if z is not None]
    zero_points = torch.cat(points) if points else None
    vectors = (scales,) if zero_points is None else (scales, zero_points)
    same = all(map(_may_decode_from, _stored(quantized), vectors))
    return (scales, zero_points) if same else None


def _block_scales(chunk: Tensor, quantized: QuantizedTensor) -> tuple[Tensor, Tensor | None]:
    size = quantized.block_size
    if quantized.stored_zero_points is not None:
        return encode_affine(chunk, size)[1:]
    padding = -chunk.numel() % size
    blocks = torch.nn.functional.pad(chunk.float(), (0, padding)).view(-1, size)
    return blocks.abs().amax(dim=1), None


def _may_decode_from(stored: DoubleQuantized | Tensor, vector: Tensor) -> bool:
    """Whether `stored` is, to the error of double quantization, this vector."""
    if not isinstance(stored, DoubleQuantized):
        return torch.equal(stored, vector)
    steps = stored.scales.repeat_interleave(stored.block_size)[: vector.numel()]
    # Three float32 roundings, of values that may be as large as the offset; and a short last block
    # of zeros has a tiny scale instead of zero.
    rounding = 2.0**-22 * (vector.abs() + abs(stored.offset)) + EMPTY_TAIL_SCALE
    return bool(((stored.dequantize() - vector).abs() <= steps * DYNAMIC_MAP_STEP + rounding).all())


def _stored(quantized: QuantizedTensor) -> Iterator[DoubleQuantized | Tensor]:
    yield quantized.stored_scales
    if quantized.stored_zero_points is not None:
        yield quantized.stored_zero_points


def _saved(stored: DoubleQuantized | Tensor) -> int:
    return 4 * stored.codes.numel() - stored.nbytes if isinstance(stored, DoubleQuantized) else 0


def _relative(sum_squared_error: float, sum_squares: float) -> float:
    if sum_squared_error == 0:
        return 0.0
    return math.sqrt(sum_squared_error / sum_squares) if sum_squares else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

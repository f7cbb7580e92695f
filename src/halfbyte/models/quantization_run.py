"""What becomes of each tensor when a model is quantized: 4-bit parts, or the same in 16 bits."""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.formats.bitsandbytes_layout import to_bitsandbytes
from halfbyte.formats.checks import dtype_name, require_finite, require_float
from halfbyte.formats.error_report import ErrorReport, error_report
from halfbyte.formats.quantized_tensor import quantize
from halfbyte.models.quantization_plan import Item, Quantizer
from halfbyte.models.sources import Tensors

CHECKED_TOGETHER = 1 << 20


class Quantization:
    """Converts the tensors of a source; may be called from several threads.

    Args:
        tensors: The source.
        quantizer: How weights are quantized.
        dtype: Of what stays in 16 bits, and what 4-bit weights say they decode to.
        with_report: Whether to measure every quantized weight.
    """

    def __init__(
        self, tensors: Tensors, quantizer: Quantizer, dtype: torch.dtype, *, with_report: bool
    ) -> None:
        self._tensors = tensors
        self._quantizer = quantizer
        self._dtype = dtype
        self._with_report = with_report
        self._reports: dict[str, ErrorReport] = {}

    @property
    def reports(self) -> tuple[ErrorReport, ...]:
        """Errors of the weights quantized so far, if asked for, in the order of names."""
        return tuple(self._reports[name] for name in sorted(self._reports, key=str.encode))

    def __call__(self, item: Item) -> Mapping[str, Tensor]:
        """The tensors to write for one of the source.

        Raises:
            FormatError: It cannot be quantized, or holds a NaN or an infinity.
        """
        tensor = self._tensors.read(item.name)
        require_float(tensor, item.name)
        if not item.quantized:
            return {item.name: kept_tensor(tensor, self._dtype, item.name)}
        quantized = quantize(
            tensor,
            self._quantizer.book,
            block_size=self._quantizer.block_size,
            double_quant=self._quantizer.double_quant,
            name=item.name,
        ).to(dtype=self._dtype)
        if self._with_report:
            self._reports[item.name] = error_report(tensor, quantized, name=item.name)
        return to_bitsandbytes(item.name, quantized)


def kept_tensor(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in `dtype`.

    Raises:
        FormatError: It holds a NaN or an infinity, before or after.
    """
    _require_finite(tensor, name)
    kept = tensor.to(dtype)
    if kept.dtype != tensor.dtype:  # float16 ends at 65504
        _require_finite(kept, f"{name} as {dtype_name(dtype)}")
    return kept


def _require_finite(tensor: Tensor, name: str) -> None:
    """`require_finite` without intermediates of the tensor's size."""
    for chunk in tensor.view(-1).split(CHECKED_TOGETHER):
        if not torch.isfinite(chunk).all():
            require_finite(tensor, name)

"""4-bit weights of linear layers for one merge.

Requantizing a decoded base loses the adapter: its weights sit on the grid, and a small update
rounds back to where they were. Here the scales stay the base's wherever its format is kept, so that
the base itself costs nothing, and codes move only where that brings the outputs closer to those of
base and adapter. What is left can go to a residual of low rank kept beside the model; then the
update's strongest directions, weighted with what the inputs look like, are left to the residual
from the start, and the codes only have to hold the rest.

Dimension key:
    I  input features        O  output features        R  rank
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.adapters.adapter import LoraUpdate
from halfbyte.adapters.merge_inputs import MergeInputs
from halfbyte.adapters.merging import merged_weight
from halfbyte.composition.calibration import LinearGroup
from halfbyte.composition.code_search import (
    Grid,
    damp_,
    make_feedback,
    make_grid,
    output_error,
    search,
)
from halfbyte.composition.low_rank import weighted_low_rank
from halfbyte.formats.quantized_tensor import QuantizedTensor, quantize
from halfbyte.layers.linear import Linear
from halfbyte.models.quantization_plan import Quantizer

MAX_OUTPUTS = 256
"""Searched at a time by one core: bounds its memory."""


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far a weight's outputs are from the merged ones, on the calibration text.

    Attributes:
        path: Of the linear layer.
        relative: Root mean square over that of the outputs.
        of_update: Over that of what the adapter adds to the outputs; 1 is what dropping it costs.
    """

    path: str
    relative: float
    of_update: float

    def to_json(self) -> dict[str, str | float]:
        """By field."""
        return {"path": self.path, "relative": self.relative, "of_update": self.of_update}


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What one strategy gives for a linear layer.

    Attributes:
        weight: In 4 bits.
        residual: Update to keep beside the model, or None.
        error: Of what both leave.
    """

    weight: QuantizedTensor
    residual: LoraUpdate | None
    error: OutputError


class GroupSearch:
    """What the searches for linear layers with one input share.

    Args:
        group: Takes over its moments, which are damped in place.
        pool: Threads that use one core each. A step of the search handles a vector, too little to
            share between cores: each takes outputs of its own.
    """

    def __init__(self, group: LinearGroup, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self.hessian_II = damp_(group.hessian_II)
        self._feedback = make_feedback(self.hessian_II)

    def low_rank(self, matrix_IO: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """B and A of the best approximation, judged by outputs."""
        return self._pool.submit(weighted_low_rank, matrix_IO.T, self._feedback, rank).result()

    def search(self, target_IO: Tensor, grid: Grid, start_IO: Tensor) -> tuple[Tensor, Tensor]:
        """Values and codes, `[I, O]` both."""
        num_outputs = target_IO.shape[1]
        each = min(MAX_OUTPUTS, -(-num_outputs // torch.get_num_threads()))
        values_IO = torch.empty_like(target_IO)
        codes_IO = torch.empty(target_IO.shape, dtype=torch.uint8)

        def part(begin: int) -> None:
            outputs = slice(begin, begin + each)
            chosen = grid.select(slice(None), outputs)
            values_IO[:, outputs] = search(
                target_IO[:, outputs],
                chosen,
                self.hessian_II,
                self._feedback,
                start_IO[:, outputs],
            )
            codes_IO[:, outputs] = chosen.encode(values_IO[:, outputs])

        for _ in self._pool.map(part, range(0, num_outputs, each)):
            pass
        return values_IO, codes_IO


class LinearSearch:
    """The searches for one linear layer.

    Args:
        inputs: What is merged.
        linear: The layer.
        group: That it belongs to.
        quantizer: The format.
        base: The base's weight, if it is in 4 bits; its scales are kept where it has the format.
    """

    def __init__(
        self,
        inputs: MergeInputs,
        linear: Linear,
        group: GroupSearch,
        quantizer: Quantizer,
        base: QuantizedTensor | None,
    ) -> None:
        self._path = linear.path
        self._group = group
        self._update = inputs.adapter.modules.get(linear.path)
        weight_OI = inputs.weights.read(linear.weight.name).float()
        if self._update is not None:
            weight_OI = merged_weight(weight_OI, self._update)
        self._template = _template(weight_OI, base, quantizer)
        self._weight_IO = weight_OI.T.contiguous()
        self._grid = make_grid(quantizer.book, _spread(self._template).T.contiguous())
        inputs.weights.release(linear.weight.name)

    def run(self, residual_rank: int) -> Found:
        """Codes, and a residual of that rank unless it is 0 or there is no update."""
        target_IO, residual = self._weight_IO, None
        rank = 0 if self._update is None else residual_rank
        if rank:
            b_OR, a_RI = self._group.low_rank(self._dense_update(), rank)
            target_IO = torch.addmm(target_IO, a_RI.T, b_OR.T, alpha=-1)
        start_IO = self._template.dequantize(dtype=torch.float32).T.contiguous()
        left_IO, codes_IO = self._group.search(target_IO, self._grid, start_IO)
        del target_IO, start_IO
        torch.sub(self._weight_IO, left_IO, out=left_IO)
        if rank:
            b_OR, a_RI = self._group.low_rank(left_IO, rank)
            left_IO.addmm_(a_RI.T, b_OR.T, alpha=-1)
            residual = LoraUpdate(a_RI, b_OR, float(len(a_RI)))
        weight = replace(self._template, codes=_packed(codes_IO))
        return Found(weight, residual, self._error(left_IO))

    def _dense_update(self) -> Tensor:
        if self._update is None:
            return torch.zeros_like(self._weight_IO)
        return (self._update.a_RI.T @ self._update.b_OR.T).mul_(self._update.scaling)

    def _error(self, left_IO: Tensor) -> OutputError:
        left, whole, update = (
            float(output_error(matrix_IO, self._group.hessian_II).sum())
            for matrix_IO in (left_IO, self._weight_IO, self._dense_update())
        )
        return OutputError(self._path, _root_ratio(left, whole), _root_ratio(left, update))


def _template(
    merged_OI: Tensor, base: QuantizedTensor | None, quantizer: Quantizer
) -> QuantizedTensor:
    """Scales to keep, and codes to start from: the base's, or the nearest ones."""
    same_format = (
        base is not None
        and base.codebook == quantizer.book
        and base.block_size == quantizer.block_size
        and base.double_quantized == quantizer.double_quant
    )
    if base is not None and same_format:
        return base
    return quantize(
        merged_OI,
        quantizer.book,
        block_size=quantizer.block_size,
        double_quant=quantizer.double_quant,
    )


def _spread(quantized: QuantizedTensor) -> Tensor:
    """The scale of every element, `[O, I]`; blocks may cross rows."""
    repeated = quantized.scales.repeat_interleave(quantized.block_size)
    return repeated[: quantized.numel].view(quantized.shape)


def _packed(codes_IO: Tensor) -> Tensor:
    """Two codes a byte, the earlier element in the high nibble."""
    flat = codes_IO.T.reshape(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[::2] << 4 | flat[1::2]


def _root_ratio(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole else 0.0

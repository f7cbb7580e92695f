"""4-bit weights of linear layers that share an input, chosen together for one merge.

Requantizing a decoded base loses the adapter: its weights sit on the grid, and a small update
rounds back to where they were. Here the scales stay the base's wherever its format is kept, so that
the base itself costs nothing, and codes move only where that brings the outputs closer to those of
base and adapter. What is left can go to a residual of low rank kept beside the model; then the
update's strongest directions, weighted with what the inputs look like, are left to the residual
from the start, and the codes only have to hold the rest.

Dimension key:
    I  input features        O  outputs that share the inputs        R  rank
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.adapters.adapter import LoraUpdate
from halfbyte.adapters.merge_inputs import MergeInputs
from halfbyte.adapters.merging import merged_weight
from halfbyte.composition.calibration import LinearGroup
from halfbyte.composition.code_search import (
    damp_,
    make_feedback,
    make_grid,
    output_error,
    search,
)
from halfbyte.composition.low_rank import weighted_low_rank
from halfbyte.formats.quantized_tensor import QuantizedTensor, quantize
from halfbyte.models.quantization_plan import Quantizer

MAX_OUTPUTS = 1024
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
class GroupResult:
    """What one strategy gives for a group.

    Attributes:
        weights: By name of the weight.
        residual: Updates to keep beside the model, by path.
        errors: Of what weights and residual leave.
    """

    weights: Mapping[str, QuantizedTensor]
    residual: Mapping[str, LoraUpdate]
    errors: list[OutputError]


class GroupSearch:
    """The search for one group; what strategies share is computed once.

    Args:
        inputs: What is merged.
        group: Takes over its moments, which are damped in place.
        quantizer: The format.
        base: 4-bit weights whose scales are kept where they have that format.
        pool: Threads that use one core each. A step of the search handles a vector, too little to
            share between cores: each takes outputs of its own.
    """

    def __init__(
        self,
        inputs: MergeInputs,
        group: LinearGroup,
        quantizer: Quantizer,
        base: Mapping[str, QuantizedTensor],
        pool: ThreadPoolExecutor,
    ) -> None:
        self._linears = group.linears
        self._sizes = [linear.out_features for linear in group.linears]
        self._pool = pool
        self._hessian_II = damp_(group.hessian_II)
        self._feedback = make_feedback(self._hessian_II)
        weights, merged = [], []
        for linear in group.linears:
            weight_OI = inputs.weights.read(linear.weight.name).float()
            update = inputs.adapter.modules.get(linear.path)
            weights.append(weight_OI)
            merged.append(weight_OI if update is None else merged_weight(weight_OI, update))
        self._templates = [
            _template(weight, base.get(linear.weight.name), quantizer)
            for weight, linear in zip(merged, group.linears, strict=True)
        ]
        self._weight_IO = _joined(merged)
        self._update_IO = self._weight_IO - _joined(weights)
        self._grid = make_grid(quantizer.book, _joined([_spread(t) for t in self._templates]))
        starts = [template.dequantize(dtype=torch.float32) for template in self._templates]
        self._start_IO = _joined(starts)
        for linear in group.linears:
            inputs.weights.release(linear.weight.name)

    def run(self, residual_rank: int) -> GroupResult:
        """Codes, and a residual of that rank unless it is 0."""
        target_IO = self._weight_IO
        if residual_rank:
            target_IO = target_IO - _product(self._low_rank(self._update_IO, residual_rank))
        values_IO, codes_IO = self._search(target_IO)
        left_IO = self._weight_IO - values_IO
        residual = {}
        if residual_rank:
            factors = self._low_rank(left_IO, residual_rank)
            left_IO -= _product(factors)
            for linear, (b_OR, a_RI) in zip(self._linears, factors, strict=True):
                residual[linear.path] = LoraUpdate(a_RI, b_OR, float(len(a_RI)))
        weights = {
            linear.weight.name: replace(template, codes=_packed(codes))
            for linear, template, codes in zip(
                self._linears, self._templates, codes_IO.split(self._sizes, dim=1), strict=True
            )
        }
        return GroupResult(weights, residual, self._errors(left_IO))

    def _search(self, target_IO: Tensor) -> tuple[Tensor, Tensor]:
        """Values and codes, `[I, O]` both."""
        num_outputs = target_IO.shape[1]
        each = min(MAX_OUTPUTS, -(-num_outputs // torch.get_num_threads()))

        def part(begin: int) -> tuple[Tensor, Tensor]:
            columns = slice(begin, begin + each)
            grid = self._grid.select(slice(None), columns)
            target, start = target_IO[:, columns], self._start_IO[:, columns]
            values = search(target, grid, self._hessian_II, self._feedback, start)
            return values, grid.encode(values)

        parts = list(self._pool.map(part, range(0, num_outputs, each)))
        values, codes = zip(*parts, strict=True)
        return torch.cat(values, dim=1), torch.cat(codes, dim=1)

    def _low_rank(self, matrix_IO: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
        lower_II = torch.linalg.cholesky(self._hessian_II)
        return list(
            self._pool.map(
                lambda part_IO: weighted_low_rank(part_IO.T, lower_II, rank),
                matrix_IO.split(self._sizes, dim=1),
            )
        )

    def _errors(self, left_IO: Tensor) -> list[OutputError]:
        norms = [
            [float(part.sum()) for part in output_error(m_IO, self._hessian_II).split(self._sizes)]
            for m_IO in (left_IO, self._weight_IO, self._update_IO)
        ]
        return [
            OutputError(linear.path, _root_ratio(left, whole), _root_ratio(left, update))
            for linear, left, whole, update in zip(self._linears, *norms, strict=True)
        ]


def _product(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`[I, O]` of all linears side by side."""
    return torch.cat([(b_OR @ a_RI).T for b_OR, a_RI in factors], dim=1)


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


def _joined(matrices: Sequence[Tensor]) -> Tensor:
    """`[O, I]` each -> `[I, O]`, so that one input's weights lie side by side."""
    return torch.cat(list(matrices)).T.contiguous()


def _packed(codes_IO: Tensor) -> Tensor:
    """Two codes a byte, the earlier element in the high nibble."""
    flat = codes_IO.T.reshape(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[::2] << 4 | flat[1::2]


def _root_ratio(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole else 0.0

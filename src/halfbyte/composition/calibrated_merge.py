"""An adapter merged into 4 bits: codes chosen on a calibration text, layer by layer.

Requantizing a decoded base loses the adapter: its weights sit on the grid, and a small update
rounds back to where they were. Here the scales stay the base's wherever its format is kept, so that
the base itself costs nothing, and codes move only where that brings the outputs closer to those of
base and adapter. What is left can go to a residual of low rank kept beside the model; then the
update's strongest directions, weighted with what the inputs look like, are left to the residual
from the start, and the codes only have to hold the rest.

Dimension key:
    I  input features        O  outputs that share the inputs        R  rank
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.adapters.adapter import LoraUpdate
from halfbyte.adapters.merge_inputs import MergeInputs
from halfbyte.adapters.merging import merged_weight
from halfbyte.composition.calibration import LinearGroup, walk
from halfbyte.composition.code_search import damped, make_grid, output_error, search
from halfbyte.composition.low_rank import weighted_low_rank
from halfbyte.data.batch import Batch
from halfbyte.formats.bitsandbytes_layout import to_bitsandbytes
from halfbyte.formats.quantized_tensor import QuantizedTensor, quantize
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.models.decoder import Decoder
from halfbyte.models.quantization_plan import Quantizer


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


@dataclass(slots=True, eq=False)
class Calibrated:
    """4-bit weights of one strategy, in files of one layer each.

    Attributes:
        directory: Holds the files.
        rank: Of the residual; 0 for none.
        residual: Updates kept beside the model, by path.
        errors: By path, in the order of use.
    """

    directory: Path
    rank: int
    residual: dict[str, LoraUpdate] = field(default_factory=dict)
    errors: list[OutputError] = field(default_factory=list)
    _homes: dict[str, SafetensorsFile] = field(default_factory=dict)

    def put(self, layer: int, weights: Mapping[str, QuantizedTensor]) -> None:
        """Keep the weights of a layer."""
        path = self.directory / f"layer-{layer}.safetensors"
        parts = {name: to_bitsandbytes(name, weight) for name, weight in weights.items()}
        write_safetensors(
            path, {k: tensor for part in parts.values() for k, tensor in part.items()}
        )
        file = SafetensorsFile.open(path)
        self._homes |= dict.fromkeys(weights, file)

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors that a model file holds for a weight."""
        file = self._homes[name]
        return {key: file.read(key) for key in file.entries if _belongs(key, name)}


def calibrate(
    inputs: MergeInputs,
    live: Decoder,
    batches: Sequence[Batch],
    quantizer: Quantizer,
    strategies: Sequence[Calibrated],
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Choose the codes of every 4-bit weight for each strategy, and fit its residual.

    Args:
        inputs: What is merged.
        live: Base and adapter, in float32: what the merged model should do.
        batches: The calibration text.
        quantizer: The format; `keep` names the weights that stay as they are.
        strategies: Filled.
        progress: Called with the number of layers done.
    """
    base = inputs.base_tensors.quantized() if inputs.original is None else {}
    kept = set(quantizer.keep)
    for index, groups in enumerate(walk(live, batches)):
        found: list[dict[str, QuantizedTensor]] = [{} for _ in strategies]
        for group in groups:
            linears = tuple(one for one in group.linears if one.weight.name not in kept)
            if not linears:
                continue
            searching = _Search(inputs, LinearGroup(linears, group.hessian_II), quantizer, base)
            for strategy, weights in zip(strategies, found, strict=True):
                weights.update(searching.run(strategy))
        for strategy, weights in zip(strategies, found, strict=True):
            strategy.put(index, weights)
        if progress is not None:
            progress(index + 1)


class _Search:
    """All linear layers that share an input, searched together."""

    def __init__(
        self,
        inputs: MergeInputs,
        group: LinearGroup,
        quantizer: Quantizer,
        base: Mapping[str, QuantizedTensor],
    ) -> None:
        self._linears = group.linears
        self._hessian_II = damped(group.hessian_II)
        self._lower_II = torch.linalg.cholesky(self._hessian_II)
        weights = [inputs.weights.read(linear.weight.name).float() for linear in group.linears]
        self._updates = [inputs.adapter.modules.get(linear.path) for linear in group.linears]
        merged = [
            weight if update is None else merged_weight(weight, update)
            for weight, update in zip(weights, self._updates, strict=True)
        ]
        self._templates = [
            _template(weight, base.get(linear.weight.name), quantizer)
            for weight, linear in zip(merged, group.linears, strict=True)
        ]
        self._weight_IO = _joined(merged)
        self._update_IO = self._weight_IO - _joined(weights)
        self._grid = make_grid(quantizer.book, _joined([_spread(t) for t in self._templates]))
        starts = [t.dequantize(dtype=torch.float32) for t in self._templates]
        self._start_IO = _joined(starts)
        for linear in group.linears:
            inputs.weights.release(linear.weight.name)

    def run(self, strategy: Calibrated) -> dict[str, QuantizedTensor]:
        """Codes for one strategy, by name of the weight; residual and errors go into it."""
        target_IO = self._weight_IO
        if strategy.rank:
            first = self._low_rank(self._update_IO, strategy.rank)
            target_IO = target_IO - torch.cat([(b @ a).T for b, a in first], dim=1)
        values_IO = search(target_IO, self._grid, self._hessian_II, start_IO=self._start_IO)
        codes_IO = self._grid.encode(values_IO)
        left_IO = self._weight_IO - values_IO
        if strategy.rank:
            factors = self._low_rank(left_IO, strategy.rank)
            for linear, (b_OR, a_RI) in zip(self._linears, factors, strict=True):
                strategy.residual[linear.path] = LoraUpdate(a_RI, b_OR, float(len(a_RI)))
            left_IO -= torch.cat([(b @ a).T for b, a in factors], dim=1)
        strategy.errors += self._errors(left_IO)
        sizes = [linear.out_features for linear in self._linears]
        return {
            linear.weight.name: replace(template, codes=_packed(codes))
            for linear, template, codes in zip(
                self._linears, self._templates, codes_IO.split(sizes, dim=1), strict=True
            )
        }

    def _low_rank(self, matrix_IO: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
        sizes = [linear.out_features for linear in self._linears]
        return [
            weighted_low_rank(part_IO.T, self._lower_II, rank)
            for part_IO in matrix_IO.split(sizes, dim=1)
        ]

    def _errors(self, left_IO: Tensor) -> list[OutputError]:
        sizes = [linear.out_features for linear in self._linears]
        norms = [
            [float(part.sum()) for part in output_error(m_IO, self._hessian_II).split(sizes)]
            for m_IO in (left_IO, self._weight_IO, self._update_IO)
        ]
        return [
            OutputError(linear.path, _root_ratio(left, whole), _root_ratio(left, update))
            for linear, left, whole, update in zip(self._linears, *norms, strict=True)
        ]


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


def _belongs(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _root_ratio(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole else 0.0

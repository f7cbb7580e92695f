"""An adapter merged into 4 bits: codes chosen on a calibration text, layer by layer.

Weights of a layer are kept in a file of their own as soon as they are found, so that memory does
not grow with the model; files of the model are put together from them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from halfbyte.adapters.adapter import LoraUpdate
from halfbyte.adapters.merge_inputs import MergeInputs
from halfbyte.composition.calibration import LinearGroup, walk
from halfbyte.composition.group_search import GroupSearch, LinearSearch, OutputError
from halfbyte.data.batch import Batch
from halfbyte.formats.bitsandbytes_layout import to_bitsandbytes
from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.models.decoder import Decoder
from halfbyte.models.quantization_plan import Quantizer
from halfbyte.models.threads import single_core_threads


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
    with single_core_threads() as pool:

        def search(group: LinearGroup, found: Sequence[dict[str, QuantizedTensor]]) -> None:
            shared = GroupSearch(group, pool)
            for linear in group.linears:
                name = linear.weight.name
                if name in kept:
                    continue
                searching = LinearSearch(inputs, linear, shared, quantizer, base.get(name))
                for strategy, weights in zip(strategies, found, strict=True):
                    result = searching.run(strategy.rank)
                    weights[name] = result.weight
                    strategy.errors.append(result.error)
                    if result.residual is not None:
                        strategy.residual[linear.path] = result.residual

        for index, groups in enumerate(walk(live, batches)):
            found: list[dict[str, QuantizedTensor]] = [{} for _ in strategies]
            for group in groups:
                search(group, found)
                del group  # its moments, before the next layer's
            for strategy, weights in zip(strategies, found, strict=True):
                strategy.put(index, weights)
            if progress is not None:
                progress(index + 1)


def _belongs(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")

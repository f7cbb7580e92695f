"""4-bit candidates of a merge, each a model directory of its own.

`plain` rounds every merged weight to its nearest code, as other tools do. `calibrated` chooses
codes on a text; `calibrated + residual` leaves what codes cannot hold to an adapter of low rank.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from halfbyte.adapters.adapter import Adapter
from halfbyte.adapters.merge_inputs import MergeInputs
from halfbyte.adapters.merging import merged_weight, write_companions
from halfbyte.adapters.peft_files import write_adapter
from halfbyte.composition.calibrated_merge import Calibrated, calibrate
from halfbyte.data.batch import Batch
from halfbyte.formats.bitsandbytes_layout import quantization_config
from halfbyte.models.decoder import Decoder
from halfbyte.models.quantization_plan import Item, Quantizer, kept_dtype, plan_weights
from halfbyte.models.quantization_run import Quantization, kept_tensor
from halfbyte.models.weight_writing import Conversion, write_weights
from halfbyte.storage.atomic import check_free_space

PLAIN, CALIBRATED, RESIDUAL = "plain", "calibrated", "calibrated + residual"
RESIDUAL_DIRECTORY = "residual"


class MergedTensors:
    """The base's tensors with the adapter added, in float32 where it is."""

    def __init__(self, inputs: MergeInputs) -> None:
        self._weights = inputs.weights
        self._updates = inputs.adapter.modules
        self.shapes = inputs.weights.shapes
        self.num_bytes = inputs.weights.num_bytes

    def size(self, name: str) -> int:
        """Bytes in the base's files."""
        return self._weights.size(name)

    def read(self, name: str) -> Tensor:
        """The merged tensor."""
        weight = self._weights.read(name)
        update = self._updates.get(name.removesuffix(".weight"))
        return weight if update is None else merged_weight(weight, update)

    def release(self, name: str) -> None:
        """Give the base's pages back."""
        self._weights.release(name)


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A 4-bit merge.

    Attributes:
        directory: A model directory.
        fingerprint: Of its tensors.
        nbytes: Of its tensors.
        calibrated: Its search; None for `plain`.
    """

    directory: Path
    fingerprint: str
    nbytes: int
    calibrated: Calibrated | None

    def move_to(self, target: Path) -> None:
        """Put the files of the directory into another."""
        for entry in sorted(self.directory.iterdir()):
            entry.rename(target / entry.name)

    def write_residual(self, target: Path, model: Path) -> None:
        """Write the residual as an adapter for this model."""
        assert self.calibrated is not None  # noqa: S101  (only called with a residual)
        provenance = {"base": {"path": str(model), "fingerprint": self.fingerprint}}
        residual = Adapter(self.calibrated.residual, str(model), provenance=provenance)
        write_adapter(residual, target)


class FourBitMerge:
    """Writes the candidates of one merge below a directory.

    Args:
        inputs: What is merged.
        codebook: `nf4` or `fp4`.
        scratch: Exists; candidates and what they are made from go there.
        shard_bytes: What one file may hold.
    """

    def __init__(
        self, inputs: MergeInputs, codebook: str, scratch: Path, *, shard_bytes: int
    ) -> None:
        self._inputs = inputs
        self._tensors = MergedTensors(inputs)
        self._scratch = scratch
        self.quantizer = quantizer_like(inputs, codebook)
        self._dtype = kept_dtype(inputs.source)
        self._plan = plan_weights(
            inputs.source, self.quantizer, self._dtype, shard_bytes=shard_bytes
        )
        # Three candidates, and the layers of two of them before they are put together.
        check_free_space(scratch, 5 * self._plan.num_bytes)

    def plain(self) -> Candidate:
        """Every weight rounded to its nearest code."""
        convert = Quantization(self._tensors, self.quantizer, self._dtype, with_report=False)
        return self._write(PLAIN, convert, None)

    def calibrated(
        self,
        live: Decoder,
        batches: Sequence[Batch],
        residual_rank: int,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[Candidate, Candidate]:
        """Codes chosen on a text, without and with a residual."""
        strategies = [
            Calibrated(self._scratch / name, rank)
            for name, rank in (("codes", 0), ("codes-for-residual", residual_rank))
        ]
        for strategy in strategies:
            strategy.directory.mkdir()
        calibrate(self._inputs, live, batches, self.quantizer, strategies, progress=progress)
        found = []
        for name, strategy in zip((CALIBRATED, RESIDUAL), strategies, strict=True):
            found.append(self._write(name, self._assembled(strategy), strategy))
            shutil.rmtree(strategy.directory)
        return found[0], found[1]

    def _assembled(self, strategy: Calibrated) -> Conversion:
        def convert(item: Item) -> Mapping[str, Tensor]:
            if item.quantized:
                return strategy.parts(item.name)
            tensor = self._tensors.read(item.name)
            return {item.name: kept_tensor(tensor, self._dtype, item.name)}

        return convert

    def _write(self, name: str, convert: Conversion, strategy: Calibrated | None) -> Candidate:
        directory = self._scratch / name
        directory.mkdir()
        written = write_weights(directory, self._tensors, self._plan, convert, progress=None)
        quantizer = self.quantizer
        kept = self._plan.kept_modules
        config = quantization_config(
            quantizer.book,
            block_size=quantizer.block_size,
            double_quant=quantizer.double_quant,
            compute_dtype=self._dtype,
            skip_modules=("lm_head", *kept) if kept else None,
        )
        record = {
            "dtype": quantizer.codebook,
            "strategy": name,
            "residual_rank": 0 if strategy is None else strategy.rank,
            "quantizer": asdict(quantizer),
        }
        write_companions(
            directory,
            self._inputs,
            written.fingerprint,
            record,
            dtype=self._dtype,
            quantization=config,
        )
        return Candidate(directory, written.fingerprint, written.nbytes, strategy)


def quantizer_like(inputs: MergeInputs, codebook: str) -> Quantizer:
    """The base's block size and double quantization; what it has in 16 bits stays so."""
    quantized = inputs.base_tensors.quantized()
    if not quantized:
        return Quantizer(codebook)
    first = next(iter(quantized.values()))
    linears = [name for name in inputs.base_tensors.shapes if name.endswith("_proj.weight")]
    keep = tuple(name for name in linears if name not in quantized)
    return Quantizer(codebook, first.block_size, first.double_quantized, keep)

"""The steps of one merge inside the directory that will hold it."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.adapters.adapter import Adapter
from halfbyte.adapters.attaching import attach_adapter
from halfbyte.adapters.merge_inputs import MergeInputs
from halfbyte.adapters.merging import dense_dtype, write_companions, write_dense
from halfbyte.composition.certificate import BASE
from halfbyte.composition.four_bit_merge import (
    CALIBRATED,
    PLAIN,
    RESIDUAL,
    RESIDUAL_DIRECTORY,
    Candidate,
    FourBitMerge,
)
from halfbyte.composition.probe import Measurement, Subject, measure
from halfbyte.composition.texts import Text
from halfbyte.layers.lora import BASE_ONLY
from halfbyte.models.load import load_decoder
from halfbyte.models.weight_writing import Progress as BytesDone

COMPUTE_DTYPE = torch.float32
"""Of calibration and measurements: what they find must not be their own rounding."""

Progress = Callable[[str, float], None]
"""Takes what is being done and which part of it is done."""

_ATTACHED = "attached"
_SCRATCH = "candidates"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was written and measured, before anyone judged it.

    Attributes:
        chosen: Name of the strategy that is written.
        fingerprint: Of its tensors.
        nbytes: Of its tensors.
        live: Base and adapter on the probe text.
        strategies: The others by name.
        weights: What is known of single weights, for the report.
    """

    chosen: str
    fingerprint: str
    nbytes: int
    live: Measurement
    strategies: Mapping[str, Measurement]
    weights: Mapping[str, object]


@dataclass(frozen=True, slots=True, eq=False)
class MergeJob:
    """One merge.

    Attributes:
        inputs: What is merged.
        directory: To fill; exists, and is removed should anything fail.
        target: What the directory will be called.
        probe: The text to measure on.
        shard_bytes: What one file may hold.
        progress: Called now and then.
    """

    inputs: MergeInputs
    directory: Path
    target: Path
    probe: Text
    shard_bytes: int
    progress: Progress

    def dense(self, dtype: str) -> Outcome:
        """A model of one dtype."""
        stored = dense_dtype(dtype)

        def show(done: BytesDone) -> None:
            self.progress("merging", done.done / done.total)

        merging, written = write_dense(
            self.directory, self.inputs, stored, shard_bytes=self.shard_bytes, progress=show
        )
        write_companions(
            self.directory, self.inputs, written.fingerprint, {"dtype": dtype}, dtype=stored
        )
        live, found = self._measure({dtype: _open(self.directory, None)})
        changes = {"changes": [change.to_json() for change in merging.changes]}
        return Outcome(dtype, written.fingerprint, written.nbytes, live, found, changes)

    def four_bit(self, codebook: str, calibration: Text, residual_rank: int) -> Outcome:
        """A 4-bit model, measured beside its alternatives.

        Args:
            codebook: `nf4` or `fp4`.
            calibration: The text that codes are chosen on.
            residual_rank: Of the residual that is kept; 0 keeps none, and one of half the
                adapter's rank is measured for comparison.
        """
        scratch = self.directory / _SCRATCH
        scratch.mkdir()
        job = FourBitMerge(self.inputs, codebook, scratch, shard_bytes=self.shard_bytes)
        candidates = {PLAIN: job.plain()}
        live = _live(self.inputs)
        num_layers = len(live.decoder.layers)
        rank = residual_rank or max(1, adapter_rank(self.inputs.adapter) // 2)
        candidates[CALIBRATED], candidates[RESIDUAL] = job.calibrated(
            live.decoder,
            calibration.batches(),
            rank,
            lambda done: self.progress("calibrating", done / num_layers),
        )
        opened = {name: _open(c.directory, _residual(c)) for name, c in candidates.items()}
        measured_live, found = self._measure(opened)
        chosen = RESIDUAL if residual_rank else CALIBRATED
        candidate = candidates[chosen]
        candidate.move_to(self.directory)
        if residual_rank:
            candidate.write_residual(self.directory / RESIDUAL_DIRECTORY, self.target)
        shutil.rmtree(scratch)
        weights = {
            "output_errors": {
                name: [error.to_json() for error in c.calibrated.errors]
                for name, c in candidates.items()
                if c.calibrated is not None
            },
            "residual_rank": rank,
        }
        return Outcome(
            chosen, candidate.fingerprint, candidate.nbytes, measured_live, found, weights
        )

    def _measure(self, opened: Mapping[str, Subject]) -> tuple[Measurement, dict[str, Measurement]]:
        live = _live(self.inputs)
        batches = self.probe.batches()
        subjects = {BASE: Subject(live.decoder, BASE_ONLY), **opened}
        return measure(
            live,
            subjects,
            batches,
            progress=lambda done: self.progress("measuring", done / len(batches)),
        )


def adapter_rank(adapter: Adapter) -> int:
    """The largest rank of its updates."""
    return max(update.rank for update in adapter.modules.values())


def _live(inputs: MergeInputs) -> Subject:
    return _open(inputs.base, inputs.adapter)


def _open(directory: Path, adapter: Adapter | None) -> Subject:
    """A model directory over its pages, with an adapter beside it."""
    decoder = load_decoder(directory, compute_dtype=COMPUTE_DTYPE)
    if adapter is None:
        return Subject(decoder, BASE_ONLY)
    attach_adapter(decoder, _ATTACHED, adapter, base=None, source=directory)
    decoder.mixes = (((_ATTACHED, 1.0),),)
    return Subject(decoder, decoder.mixes[0])


def _residual(candidate: Candidate) -> Adapter | None:
    found = candidate.calibrated
    return None if found is None or not found.rank else Adapter(found.residual)

"""What a run takes: what this process holds, and on top what probes took in steps and evaluations.

The peak is in a micro-batch, in an evaluation, or after the last step, wherever most is taken. The
first step finds no optimizer state, and the first micro-batch of any step no gradients.
"""

import time
from pathlib import Path

import torch

from halfbyte.data.packing import PackingOptions
from halfbyte.data.steps import StepStream
from halfbyte.layers.cross_entropy import default_chunk_rows
from halfbyte.memory.allocator import return_freed_memory
from halfbyte.memory.resident import resident
from halfbyte.models.decoder import Decoder
from halfbyte.training.config import Config
from halfbyte.training.prediction import NOTHING, Absent, StepModel
from halfbyte.training.probe_report import ProbeReport, ProbeRequest
from halfbyte.training.probing import nearest_directory, run_probe
from halfbyte.training.run_data import RunData
from halfbyte.training.session import count_steps
from halfbyte.training.shapes import (
    BatchSize,
    MicroBatchShape,
    Sizes,
    measure_evaluation,
    measure_workload,
)

SMALL_TOKENS, LARGE_TOKENS = 192, 384
"""Tokens of the two probed micro-batches. Below some 160 kernels and allocator take other ways."""

MOST_TOKENS = 2**20
"""Where the search for the largest micro-batch ends."""

END_BYTES = 40 * 10**6
"""Of drawing the curve, after the last step: matplotlib and its fonts. It is the peak of runs whose
activations take less."""


class RunMemory:
    """Measures once for each extreme of recomputation, and predicts as often as asked."""

    def __init__(
        self, config: Config, base: Decoder, data: RunData, micro_batch_tokens: int
    ) -> None:
        """Look at the data and at what this process holds.

        Args:
            config: Of the run.
            base: Opened, and nothing attached yet.
            data: As the run reads it.
            micro_batch_tokens: Resolved.
        """
        training, vocabulary = config.training, base.config.vocabulary_size
        options = PackingOptions(
            training.tokens_per_step,
            micro_batch_tokens,
            training.seed,
            config.data.group_by_length,
        )
        return_freed_memory()
        self.held = resident()
        self.num_layers = len(base.layers)
        self.num_steps = count_steps(config, StepStream(data.train, options))
        self.workload = measure_workload(data.train, options, self.num_steps, vocabulary)
        self.probe_seconds = 0.0
        self._config, self._base = config, base
        self._held_out: Sizes = (
            frozenset()
            if data.held_out is None
            else measure_evaluation(data.held_out, micro_batch_tokens, vocabulary)
        )
        self._reports: dict[int, ProbeReport] = {}

    @property
    def most_recomputed(self) -> int:
        """Layers worth recomputing.

        The activations of the last layer are needed as soon as they are there: recomputing them
        saves nothing.
        """
        return max(self.num_layers - 1, 1)

    def peak(self, recompute: int) -> int:
        """Of the run, in bytes."""
        model = self._model(recompute)
        steps = max(
            model.peak(size, recompute, self._absent(state=state, gradients=gradients))
            for (state, gradients), sizes in self.workload.most.items()
            for size in sizes
        )
        return self._whole(model, max(steps, self._evaluation()))

    def peak_at(self, num_tokens: int, recompute: int) -> int:
        """Of a run whose micro-batches have up to so many tokens, in bytes."""
        model = self._model(recompute)
        steps = model.peak(BatchSize(num_tokens, self.workload.loss_rows), recompute)
        return self._whole(model, max(steps, self._evaluation(num_tokens)))

    def parts(self, recompute: int) -> dict[str, int]:
        """What the peak consists of, by name, in bytes."""
        peak = self.peak(recompute)
        permanent = self._any_report().parts
        kept = self._model(recompute).kept(self.workload.largest.num_tokens, recompute)
        parts = {
            "interpreter, libraries, data": self.held.total,
            **permanent,
            "activations": max(kept - sum(permanent.values()), 0),
        }
        return {**parts, "temporaries, allowance": peak - sum(parts.values())}

    def largest_tokens(self, limit: int, recompute: int) -> int:
        """Most tokens of a micro-batch whose steps stay within a peak; 0 if none."""
        most = BatchSize(MOST_TOKENS, self.workload.loss_rows)
        return self._model(recompute).largest(limit - self.held.total, recompute, most)

    def seconds_per_step(self, recompute: int) -> float:
        """By the mean micro-batch; what accumulating added to the probe is taken off."""
        work, model = self.workload, self._model(recompute)
        mean = round(work.num_tokens / work.total_micro_batches)
        extra = self._any_report().earlier_seconds if work.accumulates else 0.0
        one = max(model.seconds(mean, recompute) - extra, 0.0)
        return one * work.total_micro_batches / self.num_steps

    def _absent(self, *, state: bool, gradients: bool) -> Absent:
        """What probed micro-batches found there, and one without state or gradients does not."""
        parts = self._any_report().parts
        optimizer = parts["optimizer state"]
        if not self._config.optimizer.paged:
            accumulates = self.workload.accumulates and not gradients
            arriving = parts["gradients"] if accumulates else 0
            return Absent(arriving + (0 if state else optimizer), arriving)
        # State and gradients share the pool, which stays as full as it once was.
        if state:
            return NOTHING
        arriving = parts["trained parameters"]  # their gradients, that is
        return Absent(max(optimizer - arriving, 0), 0) if gradients else Absent(optimizer, arriving)

    def _evaluation(self, most_tokens: int = MOST_TOKENS) -> int:
        """Above what is held; batches of an evaluation are as large as micro-batches may be."""
        model = StepModel(self._any_report().evaluations)
        sizes = [
            size._replace(num_tokens=min(size.num_tokens, most_tokens)) for size in self._held_out
        ]
        return max((model.peak(size, 0) for size in sizes), default=0)

    def _whole(self, model: StepModel, taken: int) -> int:
        """The peak of the process when steps and evaluations take so much above what is held."""
        return max(self.held.total + max(taken, model.permanent + END_BYTES), self.held.peak)

    def _model(self, recompute: int) -> StepModel:
        if recompute in {0, self.most_recomputed, self.num_layers}:
            return StepModel(self._measured(recompute).steps)
        few, many = self._measured(0), self._measured(self.most_recomputed)
        return StepModel(few.steps, many.steps)

    def _any_report(self) -> ProbeReport:
        """For what is the same however much is recomputed; something was measured before."""
        return next(iter(self._reports.values()))

    def _measured(self, recompute: int) -> ProbeReport:
        if recompute in self._reports:
            return self._reports[recompute]
        begin = time.monotonic()
        self._reports[recompute] = run_probe(
            ProbeRequest(
                config=self._config,
                shapes=self._probed_shapes(),
                recompute=(recompute,),
                accumulate=self.workload.accumulates,
                evaluate=bool(self._held_out),
                num_threads=torch.get_num_threads(),
                directory=nearest_directory(Path(self._config.output.dir).absolute()),
            )
        )
        self.probe_seconds += time.monotonic() - begin
        return self._reports[recompute]

    def _probed_shapes(self) -> tuple[MicroBatchShape, ...]:
        """Two sizes: as small as still shows how memory grows, or the run's own and its half."""
        largest = self.workload.largest
        shape = self._base.config
        grows_faster = shape.attention_softcap is not None or any(
            window is not None and window < max(largest.lengths) for window in shape.windows
        )
        if grows_faster or largest.num_tokens <= LARGE_TOKENS:
            half = max(largest.num_tokens // 2, 2)
            return (largest.resized(half), largest)
        # One chunk of logits in both, and of different sizes, to see what a row of them takes; but
        # the same if chunks are short, because few rows are multiplied in another way than a chunk.
        chunk = default_chunk_rows(shape.vocabulary_size)
        fewer = chunk if 2 * chunk <= SMALL_TOKENS else max(chunk // 2, 1)
        return largest.resized(SMALL_TOKENS, fewer), largest.resized(LARGE_TOKENS, chunk)

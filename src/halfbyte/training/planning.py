"""Planning a run: measure a few small steps, predict its own, and see what fits.

The peak of a run is what this process holds before anything is trained (interpreter, libraries,
data), plus what a probe process took from the same point on, in steps and in evaluations.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.adapters.spec import resolve_targets
from halfbyte.data.packing import PackingOptions
from halfbyte.data.steps import StepStream
from halfbyte.errors import DoesNotFitError
from halfbyte.layers.cross_entropy import default_chunk_rows
from halfbyte.memory.allocator import return_freed_memory
from halfbyte.memory.available import available_memory
from halfbyte.memory.resident import resident
from halfbyte.models.decoder import Decoder
from halfbyte.training.config import Config
from halfbyte.training.disk import disk_need, state_bytes
from halfbyte.training.plan import Largest, Plan
from halfbyte.training.prediction import StepModel
from halfbyte.training.probe import ProbeReport, ProbeRequest
from halfbyte.training.probing import nearest_directory, run_probe
from halfbyte.training.run_data import RunData
from halfbyte.training.session import count_steps
from halfbyte.training.shapes import MicroBatchShape, Workload, measure_evaluation, measure_workload

SMALL_TOKENS, LARGE_TOKENS = 192, 384
"""Tokens of the two probed micro-batches. Below some 160 kernels and allocator take other ways."""

MOST_TOKENS = 2**20
"""Where the search for the largest micro-batch ends."""

HEADROOM = 0.98
"""Of the memory that is left when a setting is proposed: a process never holds quite the same."""

END_BYTES = 40 * 10**6
"""Of drawing the curve, after the last step: matplotlib and its fonts. It is the peak of runs whose
activations take less."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What the peak must stay within.

    Attributes:
        num_bytes: Of the whole process.
        origin: What sets it.
    """

    num_bytes: int
    origin: str


def find_limit(config: Config) -> Limit:
    """`memory.budget`, or what this process has and can still get."""
    if config.memory.budget is not None:
        return Limit(config.memory.budget, "memory.budget")
    available = available_memory()
    return Limit(available.bytes + resident().total, available.because)


class Planner:
    """Measures once, and predicts as often as asked."""

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
        training = config.training
        options = PackingOptions(
            training.tokens_per_step,
            micro_batch_tokens,
            training.seed,
            config.data.group_by_length,
        )
        return_freed_memory()
        self._held = resident()
        self._config, self._base = config, base
        self._micro_batch_tokens = micro_batch_tokens
        self._longest = data.train.longest()[1]
        self.limit = find_limit(config)
        self.num_steps = count_steps(config, StepStream(data.train, options))
        self.workload: Workload = measure_workload(
            data.train, options, self.num_steps, base.config.vocabulary_size
        )
        self._held_out = (
            None
            if data.held_out is None
            else measure_evaluation(data.held_out, micro_batch_tokens, base.config.vocabulary_size)
        )
        self.num_layers = len(base.layers)
        self._reports: dict[int, ProbeReport] = {}
        self._probe_seconds = 0.0

    @property
    def most_recomputed(self) -> int:
        """Layers worth recomputing.

        The activations of the last layer are needed as soon as they are there: recomputing them
        saves nothing.
        """
        return max(self.num_layers - 1, 1)

    def plan(self, recompute: int) -> Plan:
        """The prediction for so many recomputed layers, whether it fits or not."""
        tokens = self.workload.largest.num_tokens
        model = self._model(recompute)
        report = next(iter(self._reports.values()))
        peak = self._peak_of_run(recompute)
        return Plan(
            peak_bytes=peak,
            parts=self._parts(report, model.kept(tokens, recompute), peak),
            limit_bytes=self.limit.num_bytes,
            limit_from=self.limit.origin,
            micro_batch_tokens=self._micro_batch_tokens,
            largest_micro_batch=tokens,
            recompute=recompute,
            num_layers=self.num_layers,
            num_steps=self.num_steps,
            seconds_per_step=self._seconds_per_step(model, report, recompute),
            disk=disk_need(self._config, self._base),
            largest=Largest(self.largest_tokens(recompute), self._largest_rank(peak, tokens)),
            probe_seconds=self._probe_seconds,
        )

    def fewest_recomputed(self) -> int | None:
        """The fewest recomputed layers with which the run fits; None when it never does."""
        if self._peak_of_run(0) <= self.limit.num_bytes:
            return 0
        fitting = (
            count
            for count in range(1, self.most_recomputed + 1)
            if self._peak_of_run(count) <= self.limit.num_bytes
        )
        return next(fitting, None)

    def largest_tokens(self, recompute: int) -> int:
        """Most tokens of a micro-batch that fit; 0 if none."""
        room = int(HEADROOM * (self.limit.num_bytes - self._held.total))
        return self._model(recompute).largest(room, recompute, MOST_TOKENS)

    def refuse(self, plan: Plan) -> DoesNotFitError:
        """Why a plan does not fit, and the nearest configuration that does."""
        return DoesNotFitError(
            f"the run needs {_megabytes(plan.peak_bytes)} of memory; the limit is "
            f"{_megabytes(plan.limit_bytes)} ({plan.limit_from})",
            problems=[f"{name}: {_megabytes(size)}" for name, size in plan.parts.items()],
            hint=self._nearest(plan),
        )

    def _nearest(self, plan: Plan) -> str:
        longest = self._longest
        if plan.recompute < self.most_recomputed:
            fewest = self.fewest_recomputed()
            if fewest is not None:
                return f"It fits with memory.recompute=auto, which recomputes {fewest} layers."
        tokens = self.largest_tokens(self.most_recomputed)
        if tokens >= longest:
            return (
                f"It fits with memory.recompute=auto training.micro_batch_tokens={tokens}"
                + self._rank_hint(plan)
            )
        least = int(self._peak(longest, self.most_recomputed) / HEADROOM)
        return (
            f"The least for documents of {longest} tokens is memory.budget={_round_up(least)} with "
            f"memory.recompute=auto training.micro_batch_tokens={longest}"
            + (f"; with this budget, data.max_length={tokens} fits" if tokens > 1 else "")
            + self._rank_hint(plan)
        )

    def _rank_hint(self, plan: Plan) -> str:
        rank = plan.largest.rank
        return f"; or, as it is, with lora.rank={rank}." if rank else "."

    def _model(self, recompute: int) -> StepModel:
        if recompute in {0, self.most_recomputed, self.num_layers}:
            return StepModel(self.workload.loss_rows, self._measured(recompute).steps)
        few, many = self._measured(0), self._measured(self.most_recomputed)
        return StepModel(self.workload.loss_rows, few.steps, many.steps)

    def _peak(self, num_tokens: int, recompute: int) -> int:
        """Of a run whose largest micro-batch has so many tokens."""
        model = self._model(recompute)
        taken = max(
            model.peak(num_tokens, recompute),
            model.permanent + END_BYTES,
            self._evaluation_peak(num_tokens),
        )
        return max(self._held.total + taken, self._held.peak)

    def _evaluation_peak(self, num_tokens: int) -> int:
        """Above what is held; batches of an evaluation are as large as micro-batches may be."""
        if self._held_out is None:
            return 0
        most_tokens, rows = self._held_out
        evaluations = next(iter(self._reports.values())).evaluations
        return StepModel(rows, evaluations).peak(min(num_tokens, most_tokens), 0)

    def _peak_of_run(self, recompute: int) -> int:
        """Gradients of earlier micro-batches are there in all but the first of a step."""
        work, model = self.workload, self._model(recompute)
        evaluation = self._held.total + self._evaluation_peak(self._micro_batch_tokens)
        if not work.most_later:
            return max(self._peak(work.most_first, recompute), evaluation)
        gradients = next(iter(self._reports.values())).parts["gradients"]
        first = model.peak(work.most_first, recompute, absent_gradients=gradients)
        later = self._peak(work.most_later, recompute)
        return max(later, self._held.total + first, evaluation)

    def _measured(self, recompute: int) -> ProbeReport:
        if recompute in self._reports:
            return self._reports[recompute]
        config = self._config
        directory = nearest_directory(Path(config.output.dir).absolute())
        begin = time.monotonic()
        self._reports[recompute] = run_probe(
            ProbeRequest(
                config=config,
                shapes=self._probed_shapes(),
                recompute=(recompute,),
                accumulate=self.workload.most_later > 0,
                evaluate=self._held_out is not None,
                num_threads=torch.get_num_threads(),
                directory=directory,
            )
        )
        self._probe_seconds += time.monotonic() - begin
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
        # One chunk of logits in both, and of different sizes, to see what a row of them takes.
        chunk = default_chunk_rows(shape.vocabulary_size)
        return (
            largest.resized(SMALL_TOKENS, max(chunk // 2, 1)),
            largest.resized(LARGE_TOKENS, chunk),
        )

    def _seconds_per_step(self, model: StepModel, report: ProbeReport, recompute: int) -> float:
        """By the mean micro-batch; what accumulating added to the probe is taken off."""
        work = self.workload
        mean = round(work.num_tokens / work.total_micro_batches)
        extra = report.warm_seconds if work.most_later else 0.0
        one = max(model.seconds(mean, recompute) - extra, 0.0)
        return one * work.total_micro_batches / self.num_steps

    def _largest_rank(self, peak: int, num_tokens: int) -> int | None:
        config, linears = self._config, self._base.linears
        if config.training.method == "full" or config.lora.rank_pattern:
            return None
        adapted = [linears[path].weight.shape for path in resolve_targets(config.lora, linears)]
        dtype = self._base.compute_dtype.itemsize
        # Factor, gradient, state, a copy in the compute dtype; and each token's product with A.
        each = sum(map(sum, adapted)) * (4 + 4 + state_bytes(config) + dtype)
        each += num_tokens * len(adapted) * dtype
        return max(0, config.lora.rank + int((self.limit.num_bytes - peak) // each))

    def _parts(self, report: ProbeReport, kept: int, peak: int) -> dict[str, int]:
        parts = {"interpreter, libraries, data": self._held.total, **report.parts}
        permanent = sum(report.parts.values())
        parts["activations"] = max(kept - permanent, 0)
        parts["temporaries, allowance"] = peak - sum(parts.values())
        return parts


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _round_up(count: int) -> str:
    return f"{-(-count // 10**6)}MB"

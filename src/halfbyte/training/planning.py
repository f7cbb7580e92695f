"""Planning a run: what it will take, whether that fits, and what would."""

from dataclasses import dataclass

from halfbyte.adapters.spec import resolve_targets
from halfbyte.errors import DoesNotFitError
from halfbyte.memory.available import available_memory
from halfbyte.memory.resident import resident
from halfbyte.models.decoder import Decoder
from halfbyte.training.config import Config
from halfbyte.training.disk import disk_need, state_bytes
from halfbyte.training.plan import Largest, Plan
from halfbyte.training.run_data import RunData
from halfbyte.training.run_memory import RunMemory

HEADROOM = 0.98
"""Of the memory that is left when a setting is proposed: a process never holds quite the same."""


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
    """Plans a run for any number of recomputed layers."""

    def __init__(
        self, config: Config, base: Decoder, data: RunData, micro_batch_tokens: int
    ) -> None:
        """As `RunMemory`."""
        self.memory = RunMemory(config, base, data, micro_batch_tokens)
        self._config, self._base = config, base
        self._micro_batch_tokens = micro_batch_tokens
        self._longest = data.train.longest()[1]
        self._limit = find_limit(config)

    def plan(self, recompute: int) -> Plan:
        """The prediction for so many recomputed layers, whether it fits or not."""
        memory = self.memory
        peak = memory.peak(recompute)
        return Plan(
            peak_bytes=peak,
            parts=memory.parts(recompute),
            limit_bytes=self._limit.num_bytes,
            limit_from=self._limit.origin,
            micro_batch_tokens=self._micro_batch_tokens,
            largest_micro_batch=memory.workload.largest.num_tokens,
            recompute=recompute,
            num_layers=memory.num_layers,
            num_steps=memory.num_steps,
            seconds_per_step=memory.seconds_per_step(recompute),
            disk=disk_need(self._config, self._base),
            largest=Largest(self._largest_tokens(recompute), self._largest_rank(peak)),
            probe_seconds=memory.probe_seconds,
        )

    def fewest_recomputed(self) -> int | None:
        """The fewest recomputed layers with which the run fits; None when it never does."""
        counts = range(self.memory.most_recomputed + 1)
        return next((n for n in counts if self.memory.peak(n) <= self._limit.num_bytes), None)

    def refuse(self, plan: Plan) -> DoesNotFitError:
        """Why a plan does not fit, and the nearest configuration that does."""
        return DoesNotFitError(
            f"the run needs {_megabytes(plan.peak_bytes)} of memory; the limit is "
            f"{_megabytes(plan.limit_bytes)} ({plan.limit_from})",
            problems=[f"{name}: {_megabytes(size)}" for name, size in plan.parts.items()],
            hint=self._nearest(plan),
        )

    def _nearest(self, plan: Plan) -> str:
        longest, most = self._longest, self.memory.most_recomputed
        if plan.recompute < most:
            fewest = self.fewest_recomputed()
            if fewest is not None:
                return f"It fits with memory.recompute=auto, which recomputes {fewest} layers."
        tokens = self._largest_tokens(most)
        rank = plan.largest.rank
        or_rank = f"; or, as it is, with lora.rank={rank}." if rank else "."
        if tokens >= longest:
            return (
                f"It fits with memory.recompute=auto training.micro_batch_tokens={tokens}{or_rank}"
            )
        least = int(self.memory.peak_at(longest, most) / HEADROOM)
        return (
            f"The least for documents of {longest} tokens is memory.budget={_round_up(least)} with "
            f"memory.recompute=auto training.micro_batch_tokens={longest}"
            + (f"; with this budget, data.max_length={tokens} fits" if tokens > 1 else "")
            + or_rank
        )

    def _largest_tokens(self, recompute: int) -> int:
        """Most tokens of a micro-batch that fit; 0 if none."""
        held = self.memory.held.total
        limit = held + int(HEADROOM * (self._limit.num_bytes - held))
        return self.memory.largest_tokens(limit, recompute)

    def _largest_rank(self, peak: int) -> int | None:
        config, linears = self._config, self._base.linears
        if config.training.method == "full" or config.lora.rank_pattern:
            return None
        adapted = [linears[path].weight.shape for path in resolve_targets(config.lora, linears)]
        dtype = self._base.compute_dtype.itemsize
        # Factor, gradient, state, a copy in the compute dtype; and each token's product with A.
        each = sum(map(sum, adapted)) * (4 + 4 + state_bytes(config) + dtype)
        each += self.memory.workload.largest.num_tokens * len(adapted) * dtype
        return max(0, config.lora.rank + int((self._limit.num_bytes - peak) // each))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _round_up(count: int) -> str:
    return f"{-(-count // 10**6)}MB"

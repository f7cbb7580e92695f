"""From a few measured steps to the memory and the time of any step.

Between two places of a step memory grows linearly with tokens, and with the number of layers that
keep their activations as long as one layer still keeps them. So each place is extrapolated by
itself, and the largest is the peak: a straight line through the peaks of small steps would
miss that the peak moves from the loss, which is limited to a chunk, to the backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.training.probe_report import StepMemory

LOSS = 1
"""The place that grows with the rows of logits that are there at once, besides what is kept."""

FIXED_ALLOWANCE = 8 * 10**6
"""Bytes added to every prediction: counters that are read a few hundred KB late, small blocks that
lie between others, threads."""

GROWING_ALLOWANCE = 0.01
"""Part of what training takes that is added as well."""


@dataclass(frozen=True, slots=True)
class StepModel:
    """Memory and time of a step with one micro-batch, from measured ones.

    Attributes:
        loss_rows: Targets whose logits are there at once in the steps to predict.
        keeping: Steps of growing size with few recomputed layers: none, or the setting.
        recomputing: The same with many; empty when only one setting was measured.
    """

    loss_rows: int
    keeping: tuple[StepMemory, ...]
    recomputing: tuple[StepMemory, ...] = ()

    @property
    def permanent(self) -> int:
        """Bytes above the start that stay when a step is over."""
        return min(step.peaks[-1] for step in self.keeping)

    def peak(
        self, num_tokens: int, recompute: int, *, absent_state: int = 0, absent_gradients: int = 0
    ) -> int:
        """Bytes above the start at the worst place of a step, allowance included.

        Args:
            num_tokens: Of the micro-batch.
            recompute: Layers; within what was measured.
            absent_state: Bytes of optimizer state that were there when measuring and come only at
                the last place.
            absent_gradients: Bytes of gradients that were there when measuring and come one by one
                in the backward.
        """
        at_least = self._peaks(self.keeping, num_tokens)
        part = self._part(recompute)
        if part:
            fewer = self._peaks(self.recomputing, num_tokens)
            if len(fewer) != len(at_least):
                at_least, fewer = [max(at_least)], [max(fewer)]
            at_least = [a + part * (b - a) for a, b in zip(at_least, fewer, strict=True)]
        last = len(at_least) - 1
        for place in range(last):
            at_least[place] -= absent_state + absent_gradients * (last - place) / last
        return round(max(at_least) * (1 + GROWING_ALLOWANCE)) + FIXED_ALLOWANCE

    def kept(self, num_tokens: int, recompute: int) -> int:
        """Bytes above the start where the loss begins."""
        few = _extrapolate([(s.num_tokens, s.kept) for s in self.keeping], num_tokens)
        part = self._part(recompute)
        if not part:
            return round(few)
        many = _extrapolate([(s.num_tokens, s.kept) for s in self.recomputing], num_tokens)
        return round(few + part * (many - few))

    def seconds(self, num_tokens: int, recompute: int) -> float:
        """A step of that one micro-batch."""
        few = _extrapolate([(s.num_tokens, s.seconds) for s in self.keeping], num_tokens)
        part = self._part(recompute)
        if not part:
            return few
        many = _extrapolate([(s.num_tokens, s.seconds) for s in self.recomputing], num_tokens)
        return few + part * (many - few)

    def largest(self, limit: int, recompute: int, most: int) -> int:
        """Most tokens, up to `most`, of a micro-batch whose peak stays within `limit`; or 0."""
        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.peak(middle, recompute) <= limit:
                low = middle
            else:
                high = middle
        return low

    def _part(self, recompute: int) -> float:
        """How far from the first setting to the second."""
        first = self.keeping[0].recompute
        if recompute == first or not self.recomputing:
            return 0.0
        return (recompute - first) / (self.recomputing[0].recompute - first)

    def _peaks(self, steps: Sequence[StepMemory], num_tokens: int) -> list[float]:
        """The peak of every place; of the step as a whole when places differ."""
        if len({len(step.peaks) for step in steps}) != 1:
            return [_extrapolate([(s.num_tokens, max(s.peaks)) for s in steps], num_tokens)]
        peaks = [
            _extrapolate(
                [(s.num_tokens, peak) for s, peak in zip(steps, place, strict=True)], num_tokens
            )
            for place in zip(*(step.peaks for step in steps), strict=True)
        ]
        if len(peaks) > LOSS:
            kept = _extrapolate([(s.num_tokens, s.kept) for s in steps], num_tokens)
            rows = [(s.loss_rows, s.peaks[LOSS] - s.kept) for s in steps]
            peaks[LOSS] = kept + _extrapolate(rows, self.loss_rows)
        return peaks


def _extrapolate(points: Sequence[tuple[int, float]], at: int) -> float:
    """A line through the first and the last point, never falling; constant for a single one."""
    (first, low), (last, high) = points[0], points[-1]
    slope = max(0.0, (high - low) / (last - first)) if last > first else 0.0
    return high + slope * (at - last)

"""From a few measured steps to the memory and the time of any step.

Between two places of a step memory grows linearly with tokens, and with the number of layers that
keep their activations as long as one layer still keeps them. So each place is extrapolated by
itself, and the largest is the peak: a straight line through the peaks of small steps would
miss that the peak moves from the loss, which is limited to a chunk, to the backward.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from halfbyte.training.probe_report import StepMemory
from halfbyte.training.shapes import BatchSize

LOSS = 1
"""The place that grows with the rows of logits that are there at once, besides what is kept."""

FIXED_ALLOWANCE = 14 * 10**6
"""Bytes added to every prediction: counters that are read a few hundred KB late, small blocks that
lie between others, threads. With 8 MB the least that a measured run stayed below was 2 MB."""

GROWING_ALLOWANCE = 0.01
"""Part of what training takes that is added as well."""


@dataclass(frozen=True, slots=True)
class Absent:
    """What was there when measuring, and comes only in the course of a step.

    Attributes:
        num_bytes: So much is missing where the step begins.
        arriving: Bytes that come one by one in the backward and take its place. What is still
            missing at the end of the backward comes in the optimizer's step.
    """

    num_bytes: int
    arriving: int

    def at(self, place: int, last: int) -> float:
        """Bytes missing at a place; in the last, the optimizer's step, none are."""
        if place == last:
            return 0.0
        return max(self.num_bytes - self.arriving * place / last, 0.0)


NOTHING = Absent(0, 0)


@dataclass(frozen=True, slots=True)
class StepModel:
    """Memory and time of a step with one micro-batch, from measured ones.

    Attributes:
        keeping: Steps of growing size with few recomputed layers: none, or the setting.
        recomputing: The same with many; empty when only one setting was measured.
    """

    keeping: tuple[StepMemory, ...]
    recomputing: tuple[StepMemory, ...] = ()

    @property
    def permanent(self) -> int:
        """Bytes above the start that stay when a step is over."""
        return min(step.peaks[-1] for step in self.keeping)

    def peak(self, size: BatchSize, recompute: int, absent: Absent = NOTHING) -> int:
        """Bytes above the start at the worst place of a step, allowance included.

        Args:
            size: Of the micro-batch.
            recompute: Layers; within what was measured.
            absent: What the measured steps had from their begin, and this one has not.
        """
        peaks = self._peaks(self.keeping, size)
        part = self._part(recompute)
        if part:
            fewer = self._peaks(self.recomputing, size)
            if len(fewer) != len(peaks):
                peaks, fewer = [max(peaks)], [max(fewer)]
            peaks = [a + part * (b - a) for a, b in zip(peaks, fewer, strict=True)]
        last = len(peaks) - 1
        worst = max(peak - absent.at(place, last) for place, peak in enumerate(peaks))
        return round(worst * (1 + GROWING_ALLOWANCE)) + FIXED_ALLOWANCE

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

    def largest(self, limit: int, recompute: int, most: BatchSize) -> int:
        """Most tokens of a micro-batch no larger than `most` with a peak within `limit`; or 0."""
        low, high = 0, most.num_tokens + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.peak(BatchSize(middle, most.loss_rows), recompute) <= limit:
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

    def _peaks(self, steps: Sequence[StepMemory], size: BatchSize) -> list[float]:
        """The peak of every place; of the step as a whole when places differ."""

        def at_size(points: Iterable[tuple[StepMemory, float]]) -> float:
            return _extrapolate([(s.num_tokens, value) for s, value in points], size.num_tokens)

        if len({len(step.peaks) for step in steps}) != 1:
            return [at_size((s, max(s.peaks)) for s in steps)]
        places = zip(*(step.peaks for step in steps), strict=True)
        peaks = [at_size(zip(steps, place, strict=True)) for place in places]
        if len(peaks) > LOSS:
            rows = [(s.loss_rows, s.peaks[LOSS] - s.kept) for s in steps]
            kept = at_size((s, s.kept) for s in steps)
            peaks[LOSS] = kept + _extrapolate(rows, size.loss_rows)
        return peaks


def _extrapolate(points: Sequence[tuple[int, float]], at: int) -> float:
    """A line through the first and the last point, never falling; constant for a single one."""
    (first, low), (last, high) = points[0], points[-1]
    slope = max(0.0, (high - low) / (last - first)) if last > first else 0.0
    return high + slope * (at - last)

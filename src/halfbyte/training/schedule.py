"""The learning rate of each step, as a factor of its peak."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up, then constant, linear or cosine to zero.

    Attributes:
        kind: What follows the warm-up.
        num_steps: Of the whole run, N.
        num_warmup_steps: W; step W - 1 (counted from 0) is the first at the peak.
    """

    kind: Literal["constant", "linear", "cosine"]
    num_steps: int
    num_warmup_steps: int

    @classmethod
    def from_ratio(
        cls, kind: Literal["constant", "linear", "cosine"], num_steps: int, warmup_ratio: float
    ) -> "Schedule":
        """A warm-up of that part of all steps, rounded up."""
        return cls(kind, num_steps, math.ceil(num_steps * warmup_ratio))

    def factor(self, step: int) -> float:
        """The factor in step `step`, counted from 0: (step + 1) / W, then from 1 towards 0.

        The decay would reach 0 in step N, which is never taken: no step is wasted.
        """
        if step < self.num_warmup_steps:
            return (step + 1) / self.num_warmup_steps
        if self.kind == "constant":
            return 1.0
        progress = (step - self.num_warmup_steps) / max(self.num_steps - self.num_warmup_steps, 1)
        if self.kind == "linear":
            return 1.0 - progress
        return 0.5 * (1.0 + math.cos(math.pi * progress))

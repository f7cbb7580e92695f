"""Dynamic loss scaling for float16: gradients are computed large and divided before use."""

from dataclasses import dataclass

GROWTH_INTERVAL = 2000
MAX_SCALE = 2.0**24


@dataclass(slots=True)
class LossScale:
    """A power of two that doubles after many good steps and halves after an overflow.

    Attributes:
        scale: What the loss is multiplied with; 1 and constant unless `dynamic`.
        dynamic: Whether it adapts: for float16 only.
        num_good_steps: Since it last changed.
    """

    scale: float = 1.0
    dynamic: bool = False
    num_good_steps: int = 0

    @classmethod
    def for_dtype(cls, compute_dtype: str) -> "LossScale":
        """Dynamic, starting at 65536, for fp16; off for others."""
        return cls(2.0**16, dynamic=True) if compute_dtype == "fp16" else cls()

    def succeed(self) -> None:
        """Count a step whose gradients were finite."""
        if not self.dynamic:
            return
        self.num_good_steps += 1
        if self.num_good_steps == GROWTH_INTERVAL:
            self.scale = min(self.scale * 2, MAX_SCALE)
            self.num_good_steps = 0

    def back_off(self) -> bool:
        """Halve after gradients that were not finite.

        Returns:
            Whether that can help: not without scaling, nor at a scale of 1 already.
        """
        if not self.dynamic or self.scale <= 1.0:
            return False
        self.scale /= 2
        self.num_good_steps = 0
        return True

"""What a probe is asked, and what it answers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from halfbyte.training.config import Config
from halfbyte.training.shapes import MicroBatchShape


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """What to measure.

    Attributes:
        config: Of the run.
        shapes: Micro-batches to take a step with.
        recompute: Numbers of recomputed layers to do it with.
        accumulate: Whether gradients of an earlier micro-batch are there meanwhile.
        evaluate: Whether to score the micro-batches, too, as an evaluation does.
        num_threads: Of PyTorch.
        directory: On the disk of the run, for what the steps write.
    """

    config: Config
    shapes: tuple[MicroBatchShape, ...]
    recompute: tuple[int, ...]
    accumulate: bool
    evaluate: bool
    num_threads: int
    directory: Path

    def to_json(self) -> str:
        """For the standard input of a probe."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content |= {
            "config": self.config.model_dump(mode="json"),
            "shapes": [asdict(shape) for shape in self.shapes],
            "directory": str(self.directory),
        }
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` made."""
        content = json.loads(text)
        shapes = (MicroBatchShape(tuple(s["lengths"]), s["num_targets"]) for s in content["shapes"])
        content |= {
            "config": Config.model_validate(content["config"]),
            "shapes": tuple(shapes),
            "recompute": tuple(content["recompute"]),
            "directory": Path(content["directory"]),
        }
        return cls(**content)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """One step, in bytes above what was resident before anything was trained.

    Attributes:
        num_tokens: Of its micro-batch.
        recompute: Layers that computed their activations again.
        loss_rows: Targets whose logits were there at once.
        peaks: Between one place of the step and the next; the second is the loss.
        kept: Where the loss begins: what the backward will need, and all that is permanent.
        seconds: From its begin to its end.
    """

    num_tokens: int
    recompute: int
    loss_rows: int
    peaks: tuple[int, ...]
    kept: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What was measured, in bytes.

    Attributes:
        steps: Shape by shape for each number of recomputed layers.
        evaluations: Shape by shape, if wanted.
        parts: What is permanent, by name.
        earlier_seconds: Of a step with `EARLIER_TOKENS`.
    """

    steps: tuple[StepMemory, ...]
    evaluations: tuple[StepMemory, ...]
    parts: dict[str, int]
    earlier_seconds: float

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> Self:
        """What a probe printed."""
        parts, seconds = content["parts"], content["earlier_seconds"]
        assert isinstance(parts, dict)  # noqa: S101  (our own process wrote it)
        assert isinstance(seconds, float)  # noqa: S101
        steps, evaluations = (_read_steps(content[name]) for name in ("steps", "evaluations"))
        return cls(steps, evaluations, parts, seconds)


def _read_steps(content: object) -> tuple[StepMemory, ...]:
    assert isinstance(content, list)  # noqa: S101  (our own process wrote it)
    return tuple(StepMemory(**{**step, "peaks": tuple(step["peaks"])}) for step in content)

"""A probe that measures nothing: memory and time of an imaginary model with round numbers."""

from dataclasses import dataclass, field

from halfbyte.training.probe_report import ProbeReport, ProbeRequest, StepMemory

MB = 10**6
KEPT, RECOMPUTED, BACKWARD = 60_000, 10_000, 90_000  # bytes a token: a layer's, its input, at once
PERMANENT, LOGITS = 20 * MB, 200_000  # once; a row
LOSS_ROWS = 750
SECONDS = 0.01  # a token


@dataclass
class FakeProbe:
    """Stands in for `run_probe`; remembers what it was asked for."""

    num_layers: int = 2
    scoring: int = 100_000  # bytes a row in an evaluation
    state: int = 0  # bytes of what is permanent
    requests: list[ProbeRequest] = field(default_factory=list)

    def __call__(self, request: ProbeRequest) -> ProbeReport:
        self.requests.append(request)
        (recompute,) = request.recompute
        steps = tuple(
            self.step(shape.num_tokens, recompute, shape.num_targets) for shape in request.shapes
        )
        evaluations = tuple(self.evaluation(s.num_tokens, s.num_targets) for s in request.shapes)
        parts = {
            "trained parameters": self.state,
            "gradients": PERMANENT - 2 * self.state,
            "optimizer state": self.state,
        }
        return ProbeReport(steps, evaluations if request.evaluate else (), parts, 0.1)

    def step(self, tokens: int, recompute: int, rows: int = LOSS_ROWS) -> StepMemory:
        # The last layer's activations are there when its backward begins, kept or not.
        kept = PERMANENT + tokens * ((self.num_layers - recompute) * KEPT + recompute * RECOMPUTED)
        at_end = max(kept, PERMANENT + tokens * ((self.num_layers - 1) * RECOMPUTED + KEPT))
        peaks = (kept, kept + rows * LOGITS, at_end + tokens * BACKWARD, PERMANENT)
        return StepMemory(tokens, recompute, rows, peaks, kept, tokens * SECONDS + 0.1)

    def evaluation(self, tokens: int, rows: int) -> StepMemory:
        kept = PERMANENT + tokens * RECOMPUTED
        peaks = (kept + tokens * KEPT, kept + self.scoring * rows)
        return StepMemory(tokens, 0, rows, peaks, kept, tokens * SECONDS)

"""How well held-out targets are predicted."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from halfbyte.data.batch import Batch
from halfbyte.data.parse import NO_TARGET
from halfbyte.layers.cross_entropy import score_targets
from halfbyte.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class HeldOutScore:
    """Over all targets, each counted once.

    Attributes:
        loss: Mean negative log-likelihood, in nats.
        accuracy: Part of targets that had the largest logit.
        num_targets: How many there were.
    """

    loss: float
    accuracy: float
    num_targets: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf  # noqa: PLR2004  (float64)


def score_held_out(decoder: Decoder, batches: Iterable[Batch]) -> HeldOutScore:
    """Score every target of the batches, without dropout and without gradients."""
    total, num_correct, num_targets = 0.0, 0, 0
    with torch.no_grad():
        for batch in batches:
            rows = (batch.targets != NO_TARGET).nonzero()[:, 0]
            features_ND = decoder(batch.tokens, batch.segments, rows=rows)
            scores = score_targets(features_ND, batch.targets[rows], decoder.head)
            total += scores.losses.double().sum().item()
            num_correct += int(scores.correct.sum())
            num_targets += len(rows)
    return HeldOutScore(total / num_targets, num_correct / num_targets, num_targets)

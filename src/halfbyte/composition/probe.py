"""How far models are from base and adapter on a text: layer by layer, and in what they predict.

All models go through the text side by side, one layer of each at a time, in float32, and are
compared with the live one: the 4-bit base with its adapter beside it.

Dimension key:
    T  tokens, packed        N  tokens with a target
    V  vocabulary            C  rows of a chunk
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.composition.calibration import forget_layer
from halfbyte.data.batch import Batch
from halfbyte.data.parse import NO_TARGET
from halfbyte.layers.lora import Mix
from halfbyte.layers.weights import NO_LAYER
from halfbyte.models.decoder import Decoder

CHUNK_ROWS = 128


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model to measure.

    Attributes:
        decoder: Computes in float32. Two subjects may share one.
        mix: The adapters that it uses.
    """

    decoder: Decoder
    mix: Mix


@dataclass(frozen=True, slots=True)
class Measurement:
    """One model on the probe text; means are over its targets.

    Attributes:
        loss: Mean negative log-likelihood, in nats.
        divergence: Mean KL(live || model), in nats.
        changed_top1: Part of the targets where the most likely token is another than live.
        layer_errors: After each layer, the norm of the difference of the residual stream from the
            live one, over the norm of that.
        loss_excess_error: Standard error of the mean difference of the loss from the live one.
    """

    loss: float
    divergence: float
    changed_top1: float
    layer_errors: tuple[float, ...]
    loss_excess_error: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@dataclass(slots=True)
class _Sums:
    """Of one subject, over the targets seen so far."""

    losses: list[Tensor] = field(default_factory=list)
    divergence: float = 0.0
    num_changed: int = 0
    squared_errors: list[float] = field(default_factory=list)


def measure(
    live: Subject,
    subjects: Mapping[str, Subject],
    batches: Sequence[Batch],
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[Measurement, dict[str, Measurement]]:
    """Measure the live model, and others against it.

    Args:
        live: What the others should do.
        subjects: The others, by name.
        batches: The text; only positions with a target are counted in what is predicted.
        progress: Called with the number of batches done.
    """
    everyone = {"": live, **subjects}
    sums = {name: _Sums() for name in everyone}
    norms = [0.0] * len(live.decoder.layers)
    for each in sums.values():
        each.squared_errors = [0.0] * len(norms)
    with torch.no_grad():
        for number, batch in enumerate(batches, start=1):
            _measure_batch(everyone, batch, sums, norms)
            if progress is not None:
                progress(number)
    of_live = torch.cat(sums[""].losses)
    found = {name: _summary(each, of_live, norms) for name, each in sums.items()}
    return found.pop(""), found


def _measure_batch(
    everyone: Mapping[str, Subject], batch: Batch, sums: Mapping[str, _Sums], norms: list[float]
) -> None:
    states = {name: s.decoder.embed(batch.tokens) for name, s in everyone.items()}
    passes = {
        name: s.decoder.prepare(batch.segments, mixes=(s.mix,)) for name, s in everyone.items()
    }
    for index in range(len(norms)):
        for name, subject in everyone.items():
            states[name] = subject.decoder.layers[index](states[name], passes[name])
            difference = states[name] - states[""]
            sums[name].squared_errors[index] += float(difference.double().square().sum())
        norms[index] += float(states[""].double().square().sum())
        for subject in everyone.values():
            forget_layer(subject.decoder, index)
    rows = (batch.targets != NO_TARGET).nonzero()[:, 0]
    features = {name: s.decoder.last_norm(states[name][rows]) for name, s in everyone.items()}
    for chunk in _chunks(len(rows)):
        targets_C1 = batch.targets[rows[chunk], None]
        expected_CV = _log_probabilities(everyone[""], features[""][chunk])
        for name, subject in everyone.items():
            found_CV = (
                expected_CV if not name else _log_probabilities(subject, features[name][chunk])
            )
            each = sums[name]
            each.losses.append(-found_CV.gather(1, targets_C1)[:, 0].double())
            each.num_changed += int((found_CV.argmax(1) != expected_CV.argmax(1)).sum())
            divergence_CV = expected_CV.exp().mul_(expected_CV - found_CV)
            each.divergence += float(divergence_CV.sum(dtype=torch.float64))


def _log_probabilities(subject: Subject, features_CD: Tensor) -> Tensor:
    logits_CV = subject.decoder.head.logits(features_CD)
    forget_layer(subject.decoder, NO_LAYER)
    return logits_CV.float().log_softmax(dim=1)


def _summary(sums: _Sums, live_N: Tensor, norms: Sequence[float]) -> Measurement:
    losses_N = torch.cat(sums.losses)
    count = len(losses_N)
    spread = float((losses_N - live_N).std()) if count > 1 else math.inf
    return Measurement(
        loss=float(losses_N.mean()),
        divergence=max(0.0, sums.divergence / count),
        changed_top1=sums.num_changed / count,
        layer_errors=tuple(
            math.sqrt(error / norm) if norm else 0.0
            for error, norm in zip(sums.squared_errors, norms, strict=True)
        ),
        loss_excess_error=spread / math.sqrt(count),
    )


def _chunks(count: int) -> Iterator[slice]:
    return (slice(begin, begin + CHUNK_ROWS) for begin in range(0, count, CHUNK_ROWS))

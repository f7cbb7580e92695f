"""Where a loss or a gradient first stopped being a number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.data.batch import Batch
from halfbyte.models.decoder import Decoder, DecoderLayer, Pass
from halfbyte.optim.accumulators import Accumulator
from halfbyte.training.step import batch_loss


@dataclass(frozen=True, slots=True)
class NonFinite:
    """What is known about a step that was not applied.

    Attributes:
        where: The first layer whose output, or the first parameter whose gradient, is not finite.
        rows: The documents of the micro-batch that shows it; of all, if only gradients do.
    """

    where: str
    rows: tuple[str, ...]


def find_non_finite(
    decoder: Decoder,
    batches: Sequence[Batch],
    parameters: Mapping[str, Tensor],
    accumulator: Accumulator,
    dropout_seeds: Sequence[int | None],
) -> NonFinite:
    """Run the micro-batches forward again and look at every layer, then at the gradients.

    Args:
        decoder: As it was when the step failed.
        batches: Micro-batches of the step.
        parameters: What is trained.
        accumulator: Their gradients.
        dropout_seeds: Of each micro-batch.
    """
    for batch, seed in zip(batches, dropout_seeds, strict=True):
        if where := _first_layer(decoder, batch, seed):
            return NonFinite(where, batch.rows)
    rows = tuple(row for batch in batches for row in batch.rows)
    for name, tensor in parameters.items():
        gradient = accumulator.of(tensor)
        if gradient is not None and not bool(gradient.isfinite().all()):
            return NonFinite(f"gradient of {name}", rows)
    return NonFinite("norm of all gradients", rows)


class _Watched:
    """A decoder layer that notes when it is the first to give something not finite."""

    def __init__(self, layer: DecoderLayer, found: list[str]) -> None:
        self.index = layer.index
        self._layer = layer
        self._found = found

    def __call__(self, x_TD: Tensor, shared: Pass) -> Tensor:
        if not self._found and not bool(x_TD.isfinite().all()):
            self._found.append(f"input of layer {self.index}")
        y_TD = self._layer(x_TD, shared)
        if not self._found and not bool(y_TD.isfinite().all()):
            self._found.append(f"output of layer {self.index}")
        return y_TD


def _first_layer(decoder: Decoder, batch: Batch, seed: int | None) -> str | None:
    found: list[str] = []
    layers = decoder.layers
    decoder.layers = [_Watched(layer, found) for layer in layers]  # type: ignore[misc]
    try:
        with torch.no_grad():
            loss = batch_loss(decoder, batch, seed)
    finally:
        decoder.layers = layers
    if not found and not bool(loss.isfinite()):
        found.append("loss")
    return found[0] if found else None

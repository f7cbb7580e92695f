"""What the linear layers of a model see when it reads a text: second moments of their inputs.

The model goes through the text layer by layer, so that one layer's weights and moments are in use
at a time.

Dimension key:
    T  tokens, packed        I  input features
    O  output features       D  hidden features
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.data.batch import Batch
from halfbyte.layers.linear import Linear
from halfbyte.layers.matmul import multiply
from halfbyte.models.decoder import Decoder, DecoderLayer
from halfbyte.models.stores import MappedStore


@dataclass(frozen=True, slots=True, eq=False)
class LinearGroup:
    """Linear layers that share an input.

    Attributes:
        linears: Of the decoder.
        hessian_II: Mean of `x xᵀ` over the tokens of the text, float32.
    """

    linears: tuple[Linear, ...]
    hessian_II: Tensor


def walk(decoder: Decoder, batches: Sequence[Batch]) -> Iterator[Iterator[LinearGroup]]:
    """Run the text through the decoder; after each layer, the groups of that layer.

    A group's moments are dropped when the next one is taken, and a layer's pages when the next
    layer begins.

    Args:
        decoder: With its adapters in `mixes`. It computes in float32.
        batches: The text.
    """
    with torch.no_grad():
        states = [decoder.embed(batch.tokens) for batch in batches]
        passes = [decoder.prepare(batch.segments) for batch in batches]
        num_tokens = sum(batch.num_tokens for batch in batches)
        for layer in decoder.layers:
            with _recording(layer) as moments:
                for index, shared in enumerate(passes):
                    states[index] = layer(states[index], shared)
            yield _groups(layer, moments, num_tokens)
            forget_layer(decoder, layer.index)


def forget_layer(decoder: Decoder, index: int) -> None:
    """Give the pages of a layer's weights back, where they are mapped."""
    if isinstance(decoder.store, MappedStore):
        decoder.store.forget_layer(index)


def groups_of(layer: DecoderLayer) -> tuple[tuple[Linear, ...], ...]:
    """The linear layers that share an input, in the order of use."""
    return (layer.inputs, (layer.output,), layer.gates, (layer.down,))


def _groups(
    layer: DecoderLayer, moments: dict[str, Tensor], num_tokens: int
) -> Iterator[LinearGroup]:
    for linears in groups_of(layer):
        yield LinearGroup(linears, moments.pop(linears[0].path).div_(num_tokens))


@contextmanager
def _recording(layer: DecoderLayer) -> Iterator[dict[str, Tensor]]:
    """The sum of `x xᵀ` for the first linear of each group while the block runs."""
    moments: dict[str, Tensor] = {}
    firsts = [linears[0] for linears in groups_of(layer)]
    before = [linear.bound for linear in firsts]
    try:
        for linear in firsts:
            moments[linear.path] = torch.zeros(linear.in_features, linear.in_features)
            linear.bound = _recorder(linear, moments[linear.path])
        yield moments
    finally:
        for linear, bound in zip(firsts, before, strict=True):
            linear.bound = bound


def _recorder(linear: Linear, moment_II: Tensor) -> Callable[[Tensor], Tensor]:
    def product(x_TI: Tensor) -> Tensor:
        moment_II.addmm_(x_TI.T, x_TI)
        weight = linear.store.acquire(linear.weight)
        bias = None if linear.bias is None else linear.store.acquire(linear.bias)
        assert bias is None or isinstance(bias, Tensor)  # noqa: S101  (never in 4 bits)
        try:
            return multiply(x_TI, weight, None if bias is None else bias.to(x_TI.dtype))
        finally:
            linear.store.release(linear.weight)
            if linear.bias is not None:
                linear.store.release(linear.bias)

    return product

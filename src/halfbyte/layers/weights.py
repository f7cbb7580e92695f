"""Weights by handle: a layer knows a weight's name, a store knows where its bytes are.

Layers ask for a weight when they multiply with it, in the forward and again in the backward, and
give it back afterwards. Nothing else may hold it: autograd contexts save the handle. So a store
decides freely where weights live: in memory, in a mapped file, in a cache smaller than the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.formats.quantized_tensor import QuantizedTensor

Weight = Tensor | QuantizedTensor

NO_LAYER = -1
"""The layer of weights that no decoder layer owns: embeddings, last norm, head."""


@dataclass(frozen=True, slots=True)
class WeightRef:
    """Handle of one weight.

    Attributes:
        name: Its key on disk, such as `model.layers.0.mlp.up_proj.weight`.
        shape: As multiplied with: `[out, in]` for a linear.
        layer: The decoder layer that uses it, or `NO_LAYER`.
    """

    name: str
    shape: tuple[int, ...]
    layer: int = NO_LAYER


class WeightStore(Protocol):
    """Where weights live."""

    @property
    def permanent(self) -> bool:
        """Whether what `acquire` returns stays valid and the same for the store's lifetime."""
        ...

    def acquire(self, ref: WeightRef) -> Weight:
        """The weight, valid until `release`. Calls nest."""
        ...

    def release(self, ref: WeightRef) -> None:
        """Undo one `acquire`."""
        ...

    def announce(self, layer: int) -> None:
        """The weights of `layer` are wanted next: a store may start to fetch them."""
        ...


class ResidentStore:
    """Weights in memory, by name."""

    permanent = True

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights = dict(weights)

    def acquire(self, ref: WeightRef) -> Weight:
        """The weight; it stays where it is."""
        return self._weights[ref.name]

    def release(self, ref: WeightRef) -> None:
        """Nothing is freed."""

    def announce(self, layer: int) -> None:
        """Nothing needs fetching."""


def as_tensor(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a plain tensor of `dtype`; no copy if it is one already."""
    if isinstance(weight, QuantizedTensor):
        return weight.dequantize(dtype=dtype)
    return weight if weight.dtype == dtype else weight.to(dtype)

"""Activations that are computed again in the backward instead of being kept.

A normalized input or a gated one costs a pass over what other nodes keep anyway; kept itself, it
would be a third of all that a layer keeps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """How to compute an activation again.

    Attributes:
        kernel: Takes the tensors, then the constants; gives the same bits each time.
        tensors: Kept by other nodes, so that keeping them here, too, takes no memory.
        constants: The other arguments.
    """

    kernel: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    constants: tuple[object, ...]


Restore = Callable[[Sequence[Tensor]], Tensor]
"""Makes an activation out of the tensors that were saved for it."""


def saved_for(x: Tensor, recipe: Recipe | None) -> tuple[tuple[Tensor, ...], Restore]:
    """What a node saves to have `x` in its backward, and how it gets `x` from that.

    The second holds no tensor: saved ones are let go when a layer is recomputed, others would stay.
    """
    if recipe is None:
        return (x,), _first
    kernel, constants = recipe.kernel, recipe.constants
    return recipe.tensors, lambda saved: kernel(*saved, *constants)


def _first(saved: Sequence[Tensor]) -> Tensor:
    return saved[0]

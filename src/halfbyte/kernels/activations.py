"""Memory for what operators and layers return: with reuse on, from activations that are gone.

From the system every block is fresh, and a training step makes gigabytes of activations: page
faults and zeros for them are a tenth to a sixth of its processor time. `reusing` keeps the blocks.
Blocks in use and kept never exceed the most that was in use at once since `release`, so what a run
peaks at does not change.

Semantics:
    activation(like, shape, dtype)   an uninitialized tensor on the device of `like`
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels import backends
from halfbyte.memory.tiers import anonymous

LEAST_BYTES = 128 * 2**10
"""Blocks from this size on are reused. Smaller ones come from the heap, which keeps them anyway."""

_RISES_AGAIN = 4  # a later layer may rise by a quarter more than those before it

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("activation(Tensor like, SymInt[] shape, ScalarType? dtype=None) -> Tensor")


def activation_reference(
    like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of its own."""
    return like.new_empty(shape, dtype=dtype)


_library.impl("activation", activation_reference, "CompositeExplicitAutograd")
# Nothing of `like` is in the result, so it wants no gradient because `like` does.
_library.impl("activation", torch.library.fallthrough_kernel, "Autograd")

_activation = torch.ops.halfbyte.activation.default


@torch.library.register_fake("halfbyte::activation")
def _(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def activation(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized tensor for a result.

    Args:
        like: Has the device, and the dtype unless another is given.
        shape: Of the result.
        dtype: Of the result.
    """
    made: Tensor = _activation(like, shape, dtype)
    return made


@contextmanager
def reusing(*, least: int = LEAST_BYTES, beside: int = 0) -> Iterator[None]:
    """Keep the blocks of activations that are gone for the length of a `with` block.

    Contents of results do not depend on it. Without native kernels nothing is kept.

    Args:
        least: Bytes of a block from which on it is kept.
        beside: Bytes of what else arrives while activations go, such as gradients: they have room
            within the most that was in use. A 32nd of the most may be kept all the same.
    """
    if not backends.native_in_use():
        yield
        return
    torch.ops.halfbyte.reuse_activations(least, beside)
    try:
        yield
    finally:
        torch.ops.halfbyte.reuse_activations(0, 0)


def release() -> None:
    """Give back what is kept; what was in use at most is forgotten. Before work of another kind."""
    if backends.native_in_use():
        torch.ops.halfbyte.release_activations()


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of activations that `reusing` takes care of.

    Attributes:
        used: In use.
        most: In use at once, at most, since `release`.
        kept: Not in use, and kept.
        fresh: That came from the system because not enough was kept, since the process began.
        out: Of what is lent, how much is in others' hands.
    """

    used: int = 0
    most: int = 0
    kept: int = 0
    fresh: int = 0
    out: int = 0


def usage() -> Usage:
    """At this moment; all zero without native kernels."""
    return Usage(*torch.ops.halfbyte.activation_usage()) if backends.native_in_use() else Usage()


def end_loan() -> None:
    """From here on what others hold is their own: activations have all that they took at most."""
    if backends.native_in_use():
        torch.ops.halfbyte.lend_activations(0)


def lent_buffer(num_bytes: int) -> Tensor:
    """Memory for others than activations, uint8 `[num_bytes]`, uninitialized, at a page's start.

    Out of what is kept, if some of that fits. Whether it is within a loan (`GivenUp`) or not, it is
    offered to activations when it is gone.
    """
    if backends.native_in_use():
        made: Tensor = torch.ops.halfbyte.lent_buffer(num_bytes)
        return made
    return anonymous(num_bytes)


class GivenUp:
    """What a backward pass has given up of the activations that it began with.

    Somebody else may use that much until the next forward pass, as `lent_buffer`s: together with
    activations it stays within the most that they took. Activations also rise in between, within
    a layer or where one is computed again; how much is seen at the layers passed so far, and left
    to those to come.
    """

    def __init__(self) -> None:
        """To be made where the backward pass begins, just after `release`."""
        self._begun = usage().used
        self._lent = 0

    def lend(self, wanted: int, keep: int = 0) -> int:
        """What others may use from here on, in bytes; what they take is not kept for activations.

        Args:
            wanted: By others.
            keep: Needed for something else.
        """
        now = usage()
        rise = max(now.most - self._begun, 0)
        given_up = self._begun - now.used - rise // _RISES_AGAIN - keep
        lent = min(given_up, wanted)
        if lent > self._lent:  # what holds for all that comes holds for what comes later
            self._lent = lent
            torch.ops.halfbyte.lend_activations(lent)
        return self._lent

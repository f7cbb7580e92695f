"""Running a part of the model that keeps its input alone, and all else only in its backward.

`torch.utils.checkpoint` does the same, and imports PyTorch's compiler for it: 77 MB, which is more
than several layers of a small model keep.
"""

from collections.abc import Callable
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputed(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`part(x)`, computed again when its backward begins.

    Args:
        part: Gives the same bits each time, and saves the same tensors in the same order.
        x: Its input; what else it takes it holds itself.

    Returns:
        The same as `part(x)`, whose graph can go backward once.
    """
    again = _Again(part, x)
    with saved_tensors_hooks(again.count, again.restore):
        return part(x)


class _Place:
    """Where a node of the graph finds a tensor that it would have saved; gone with the node."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self) -> None:
        self.tensor: Tensor | None = None


class _AllRestored(Exception):  # noqa: N818  (not an error: the way out of the second run)
    """What comes after the last saved tensor is not needed."""


class _Again:
    """The places of one run, and how to fill them."""

    def __init__(self, part: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._part = part
        self._x = x
        self._places: list[ref[_Place]] = []

    def count(self, _: Tensor) -> _Place:
        """In the first run: keep a place in the tensor's stead."""
        place = _Place()
        self._places.append(ref(place))
        return place

    def restore(self, place: _Place) -> Tensor:
        """In the backward: the tensor, after a second run if this is the first place asked for."""
        if place.tensor is None:
            self._run()
        assert place.tensor is not None  # noqa: S101  (`part` saves the same each time)
        return place.tensor

    def _run(self) -> None:
        missing = iter(self._places)
        left = len(self._places)

        def fill(tensor: Tensor) -> None:
            nonlocal left
            place = next(missing)()
            if place is not None:
                place.tensor = tensor.detach()
            left -= 1
            if not left:
                raise _AllRestored

        x = self._x.detach().requires_grad_(self._x.requires_grad)
        with torch.enable_grad(), saved_tensors_hooks(fill, _refuse):
            try:
                self._part(x)
            except _AllRestored:
                return


def _refuse(_: None) -> Tensor:
    raise AssertionError("nothing goes backward through a second run")

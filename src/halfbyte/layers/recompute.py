"""Running a part of the model that keeps its input alone, and all else only in its backward.

`torch.utils.checkpoint` does the same, and imports PyTorch's compiler for it: 77 MB, which is more
than several layers of a small model keep.
"""

from collections.abc import Callable
from contextvars import ContextVar
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

DIFFERENT = "a part saved other tensors when it was computed again"
_second_run: ContextVar[bool] = ContextVar("second_run", default=False)


def recomputed(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`part(x)`, computed again when its backward begins.

    Args:
        part: Gives the same bits each time, and saves the same tensors in the same order.
        x: Its input; what else it takes it holds itself.

    Returns:
        The same as `part(x)`, whose graph can go backward once.

    Raises:
        AssertionError: In the backward: `part` saved fewer tensors, or others.
    """
    again = _Again(part, x)
    with saved_tensors_hooks(again.count, again.restore):
        return part(x)


def in_second_run() -> bool:
    """Whether a part is being computed again: what its backward does not read may be left out."""
    return _second_run.get()


class _Place:
    """Where a node of the graph finds a tensor that it would have saved; gone with the node."""

    __slots__ = ("__weakref__", "kind", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.kind = (tensor.shape, tensor.dtype)
        self.tensor: Tensor | None = None


class _AllRestored(Exception):  # noqa: N818  (not an error: the way out of the second run)
    """What comes after the last saved tensor is not needed."""


class _Again:
    """The places of one run, and how to fill them."""

    def __init__(self, part: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._part = part
        self._x = x.detach()
        self._has_gradient = x.requires_grad
        self._places: list[ref[_Place]] = []

    def count(self, tensor: Tensor) -> _Place:
        """In the first run: keep a place in the tensor's stead."""
        place = _Place(tensor)
        self._places.append(ref(place))
        return place

    def restore(self, place: _Place) -> Tensor:
        """In the backward: the tensor, after a second run if this is the first place asked for."""
        if place.tensor is None:
            self._run()
        if place.tensor is None:
            raise AssertionError(DIFFERENT)
        return place.tensor

    def _run(self) -> None:
        missing = iter(self._places)
        left = len(self._places)

        def fill(tensor: Tensor) -> None:
            nonlocal left
            place = next(missing)()
            if place is not None:
                if place.kind != (tensor.shape, tensor.dtype):
                    raise AssertionError(DIFFERENT)
                place.tensor = tensor.detach()
            left -= 1
            if not left:
                raise _AllRestored

        x = self._x.detach().requires_grad_(self._has_gradient)
        token = _second_run.set(True)
        with torch.enable_grad(), saved_tensors_hooks(fill, _refuse):
            try:
                self._part(x)
            except _AllRestored:
                return
            finally:
                _second_run.reset(token)


def _refuse(_: None) -> Tensor:
    raise AssertionError("nothing goes backward through a second run")

"""`torch.autograd.Function` with types: what its context offers, and calling it."""

from typing import Any, Protocol

import torch
from torch import Tensor


class Context(Protocol):
    """The part of a function's context that we use.

    Attributes:
        kept: Whatever besides tensors the backward needs.
        needs_input_grad: Whether each input wants a gradient.
        saved_tensors: What was saved.
    """

    kept: Any
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save tensors for the backward."""
        ...

    def set_materialize_grads(self, value: bool) -> None:  # noqa: FBT001  (PyTorch's)
        """Whether gradients that nobody computed come as zeros, or as None."""
        ...


def apply(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    """Call a function that has one output."""
    return function.apply(*arguments)  # type: ignore[no-any-return]


def apply_many(function: type[torch.autograd.Function], *arguments: object) -> tuple[Tensor, ...]:
    """Call a function that has several outputs."""
    return function.apply(*arguments)  # type: ignore[no-any-return]

"""The gated activations of feed-forward layers: `act(gate) * up`."""

import torch
from torch import Tensor

from halfbyte.kernels.elementwise import gated as kernel
from halfbyte.kernels.elementwise import gated_backward as kernel_backward
from halfbyte.layers.autograd import Context, apply
from halfbyte.layers.recipe import Recipe

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
"""By the names that `config.json` uses."""


class _Gated(torch.autograd.Function):
    """Saves gate and up only; `act(gate)` is computed again."""

    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kept = name
        return kernel(gate, up, name)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = kernel_backward(grad.contiguous(), gate, up, ctx.kept)
        return grad_gate, grad_up, None


def gated(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """`act(gate) * up`, element by element, in float32, rounded once.

    Args:
        gate: Any shape; goes through the activation.
        up: The same shape.
        name: One of `ACTIVATIONS`.
    """
    gate, up = _as_rows(gate), _as_rows(up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return apply(_Gated, gate, up, name)
    return kernel(gate, up, name)  # type: ignore[no-any-return]


def gated_recipe(gate: Tensor, up: Tensor, name: str) -> Recipe:
    """Of `gated` with the same arguments."""
    return Recipe(kernel, (_as_rows(gate), _as_rows(up)), (name,))


def _as_rows(x: Tensor) -> Tensor:
    """What kernels read where it is: a slice of the columns of a projection, too."""
    return x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous()  # noqa: PLR2004

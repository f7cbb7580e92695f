"""The gated activations of feed-forward layers: `act(gate) * up`."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.layers.autograd import Context, apply

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
"""By the names that `config.json` uses."""


def _silu_slope(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(scale * (x + cubic * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * scale * (1 + 3 * cubic * x * x)


_SLOPES = {"silu": _silu_slope, "gelu_pytorch_tanh": _gelu_tanh_slope}


class _Gated(torch.autograd.Function):
    """Saves gate and up only; `act(gate)` is computed again."""

    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kept = name
        return ACTIVATIONS[name](gate).mul_(up)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        name = ctx.kept
        grad_up = ACTIVATIONS[name](gate).mul_(grad)
        grad_gate = _SLOPES[name](gate.float()).mul_(up).mul_(grad).to(gate.dtype)
        return grad_gate, grad_up, None


def gated(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """`act(gate) * up`, element by element.

    Args:
        gate: Any shape; goes through the activation.
        up: The same shape.
        name: A key of `ACTIVATIONS`.
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return apply(_Gated, gate, up, name)
    return ACTIVATIONS[name](gate).mul_(up)

"""RMSNorm, computed in float32 whatever the input.

Dimension key:
    D  features, the last dimension
"""

import torch
from torch import Tensor

from halfbyte.kernels.elementwise import rms_norm as kernel
from halfbyte.layers.autograd import Context, apply
from halfbyte.layers.weights import WeightRef, WeightStore, as_tensor


class _RMSNorm(torch.autograd.Function):
    """Saves its input only; autograd would keep five float32 copies."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.kept = eps
        return kernel(x.contiguous(), weight_D, eps)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D = ctx.saved_tensors
        normal = x.float()
        inverse = torch.rsqrt(normal.square().mean(dim=-1, keepdim=True) + ctx.kept)
        normal = normal * inverse
        wide = grad.float()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            scaled = wide * weight_D
            along = (scaled * normal).mean(dim=-1, keepdim=True)
            grad_x = ((scaled - normal * along) * inverse).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (wide * normal).flatten(0, -2).sum(dim=0)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, rounded once to `x.dtype`.

    Args:
        x: `[..., D]`.
        weight_D: float32; families that store `weight - 1` add the one when loading.
        eps: Added to the mean square.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        return apply(_RMSNorm, x, weight_D, eps)
    return kernel(x.contiguous(), weight_D, eps)  # type: ignore[no-any-return]


class Norm:
    """RMSNorm whose weight is in a store.

    Attributes:
        weight: Handle of the weight `[D]`.
        store: Where it lives.
        eps: Added to the mean square.
        plus_one: Whether the store holds `weight - 1`.
    """

    __slots__ = ("_ready", "eps", "plus_one", "store", "weight")

    def __init__(
        self, weight: WeightRef, store: WeightStore, *, eps: float, plus_one: bool
    ) -> None:
        self.weight = weight
        self.store = store
        self.eps = eps
        self.plus_one = plus_one
        self._ready: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """See `rms_norm`."""
        weight_D = self._ready
        return rms_norm(x, self._prepare() if weight_D is None else weight_D, self.eps)

    def _prepare(self) -> Tensor:
        stored = as_tensor(self.store.acquire(self.weight), torch.float32)
        weight_D = 1 + stored if self.plus_one else stored
        if self.store.permanent:
            self._ready = weight_D
        else:
            weight_D = weight_D.clone() if weight_D is stored else weight_D
        self.store.release(self.weight)
        return weight_D

"""RMSNorm, computed in float32 whatever the input.

Dimension key:
    D  features, the last dimension
"""

import torch
from torch import Tensor

from halfbyte.kernels.elementwise import add_rms_norm as add_kernel
from halfbyte.kernels.elementwise import rms_norm as kernel
from halfbyte.kernels.elementwise import rms_norm_backward as kernel_backward
from halfbyte.layers.autograd import Context, apply, apply_many
from halfbyte.layers.recipe import Recipe
from halfbyte.layers.weights import WeightRef, WeightStore, as_tensor


class _RMSNorm(torch.autograd.Function):
    """Saves its input only; autograd would keep five float32 copies."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight_D)
        ctx.kept = eps
        return kernel(x, weight_D, eps)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return *_gradients(ctx, grad, None), None


class _AddRMSNorm(torch.autograd.Function):
    """Saves the sum, which the residual stream keeps anyway."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, update: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, out = add_kernel(x.contiguous(), update.contiguous(), weight_D, eps)
        ctx.save_for_backward(total, weight_D)
        ctx.kept = eps
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(
        ctx: Context, grad_total: Tensor | None, grad_out: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if grad_out is None:
            return grad_total, grad_total, None, None
        grad, grad_weight = _gradients(ctx, grad_out, grad_total, index=2)
        return grad, grad, grad_weight, None


def _gradients(
    ctx: Context, grad: Tensor, carry: Tensor | None, index: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Of what was normalized and of the weight, which is input number `index`."""
    x, weight_D = ctx.saved_tensors
    carry = None if carry is None else carry.contiguous()
    want_weight = ctx.needs_input_grad[index]
    found = kernel_backward(grad.contiguous(), x, weight_D, carry, ctx.kept, want_weight)
    return found[0], found[1] if want_weight else None


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


def add_rms_norm(x: Tensor, update: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + update`, and `rms_norm` of it, in one pass.

    Args:
        x: `[..., D]`.
        update: Like `x`.
        weight_D: float32.
        eps: Added to the mean square.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, update, weight_D)):
        total, out = apply_many(_AddRMSNorm, x, update, weight_D, eps)
    else:
        total, out = add_kernel(x.contiguous(), update.contiguous(), weight_D, eps)
    return total, out


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
        return rms_norm(x, self._weight(), self.eps)

    def after_adding(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """See `add_rms_norm`."""
        return add_rms_norm(x, update, self._weight(), self.eps)

    def recipe(self, x: Tensor) -> Recipe:
        """Of `self(x)`, and of what `after_adding` gives with the sum `x`."""
        return Recipe(kernel, (x.contiguous(), self._weight()), (self.eps,))

    def _weight(self) -> Tensor:
        return self._prepare() if self._ready is None else self._ready

    def _prepare(self) -> Tensor:
        stored = as_tensor(self.store.acquire(self.weight), torch.float32)
        weight_D = 1 + stored if self.plus_one else stored
        if self.store.permanent:
            self._ready = weight_D
        else:
            weight_D = weight_D.clone() if weight_D is stored else weight_D
        self.store.release(self.weight)
        return weight_D

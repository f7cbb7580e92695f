"""RMSNorm and rotation of heads in one operator each: schemas, reference bodies, fake kernels.

Without gradients: `layers.norm` and `layers.rotary` have those.

Semantics:
    rms_norm   y = x / sqrt(mean(x^2) + eps) * weight     over the last dimension
    rotate_    (a, b) = (a cos - b sin, b cos + a sin)    a, b: halves of the last dimension
In float32 throughout, rounded once to the dtype of x. Kernels sum in another order.
"""

import torch
from torch import Tensor

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_library.define("rotate_(Tensor(a!) x, Tensor cosine, Tensor sine) -> ()")


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The normalized tensor, of the shape and dtype of `x`.

    Args:
        x: `[..., D]`, contiguous.
        weight: float32 `[D]`.
        eps: Added to the mean square.
    """
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * inverse).mul_(weight).to(x.dtype)


def rotate_reference(x: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Turn `x` in place.

    Args:
        x: `[T, H, 2 F]`, contiguous.
        cosine: float32 `[T, 1, F]`.
        sine: float32 `[T, 1, F]`.
    """
    first, second = x.float().chunk(2, dim=-1)
    x.copy_(torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1))


_library.impl("rms_norm", rms_norm_reference, "CompositeExplicitAutograd")
_library.impl("rotate_", rotate_reference, "CompositeExplicitAutograd")

rms_norm = torch.ops.halfbyte.rms_norm.default
rotate_ = torch.ops.halfbyte.rotate_.default


@torch.library.register_fake("halfbyte::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


@torch.library.register_fake("halfbyte::rotate_")
def _(x: Tensor, cosine: Tensor, sine: Tensor) -> None:  # noqa: ARG001
    return None

"""What stands between two products of a layer: schemas, reference bodies, fake kernels.

Without gradients of their own: `layers` has those.

Semantics:
    rms_norm           y = x / r * weight, r = sqrt(mean(x^2) + eps), over the last dimension
    add_rms_norm       s = x + update, rounded; y = rms_norm(s)
    rms_norm_backward  grad_x = (g - n mean(g n)) / r + carry, n = x / r, g = grad * weight;
                       grad_weight = sum over rows of grad * n
    rotate_            (a, b) = (a cos - b sin, b cos + a sin), a, b: halves of the last dimension;
                       with -sin if inverse
    gated              y = act(gate) * up, act(x) = x sigmoid(z): see _exponent
    gated_backward     grad_gate = act'(gate) * up * grad; grad_up = act(gate) * grad
In float32 throughout, each result rounded once to its dtype. Kernels sum in another order.
"""

import math

import torch
from torch import Tensor

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_library.define(
    "add_rms_norm(Tensor x, Tensor update, Tensor weight, float eps) -> (Tensor sum, Tensor out)"
)
_library.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor? carry, float eps, "
    "bool want_weight) -> (Tensor grad_x, Tensor grad_weight)"
)
_library.define("rotate_(Tensor(a!) x, Tensor cosine, Tensor sine, bool inverse=False) -> ()")
_library.define("gated(Tensor gate, Tensor up, str activation) -> Tensor")
_library.define(
    "gated_backward(Tensor grad, Tensor gate, Tensor up, str activation) "
    "-> (Tensor grad_gate, Tensor grad_up)"
)


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


def add_rms_norm_reference(
    x: Tensor, update: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum, and the sum normalized.

    Args:
        x: `[..., D]`, contiguous.
        update: Like `x`.
        weight: float32 `[D]`.
        eps: Added to the mean square.
    """
    total = x + update
    return total, rms_norm_reference(total, weight, eps)


def rms_norm_backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    carry: Tensor | None,
    eps: float,
    want_weight: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and of `weight`; the latter `[0]` if it is not wanted.

    Args:
        grad: Gradient of the output, like `x`.
        x: What was normalized, `[..., D]`, contiguous.
        weight: float32 `[D]`.
        carry: Gradient that reaches `x` on another way, added; like `x`.
        eps: Added to the mean square.
        want_weight: Whether the second result is wanted.
    """
    wide, normal = grad.float(), x.float()
    inverse = torch.rsqrt(normal.square().mean(dim=-1, keepdim=True) + eps)
    normal = normal * inverse
    scaled = wide * weight
    along = (scaled * normal).mean(dim=-1, keepdim=True)
    grad_x = (scaled - normal * along) * inverse
    if carry is not None:
        grad_x += carry
    grad_weight = (wide * normal).flatten(0, -2).sum(dim=0) if want_weight else weight.new_empty(0)
    return grad_x.to(x.dtype), grad_weight


def rotate_reference(
    x: Tensor,
    cosine: Tensor,
    sine: Tensor,
    inverse: bool = False,  # noqa: FBT001, FBT002  (as in the schema)
) -> None:
    """Turn `x` in place.

    Args:
        x: `[T, H, 2 F]`; the features of a head are consecutive.
        cosine: float32 `[T, 1, F]`.
        sine: float32 `[T, 1, F]`.
        inverse: The other way.
    """
    first, second = x.float().chunk(2, dim=-1)
    sine = -sine if inverse else sine
    x.copy_(torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1))


def gated_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`act(gate) * up`, contiguous.

    Args:
        gate: Contiguous, or `[T, I]` with consecutive features.
        up: Like `gate`.
        activation: `silu` or `gelu_pytorch_tanh`.
    """
    x = gate.float()
    return (x * torch.sigmoid(_exponent(x, activation)[0]) * up).to(gate.dtype).contiguous()


def _exponent(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Of an activation x sigmoid(z): z and dz/dx.

    gelu_pytorch_tanh is x / 2 (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
    """
    if activation == "silu":
        return x, torch.ones_like(x)
    twice = 2 * math.sqrt(2 / math.pi)
    return twice * (x + 0.044715 * x**3), twice * (1 + 3 * 0.044715 * x * x)


def gated_backward_reference(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Gradients of `gate` and `up`, contiguous.

    Args:
        grad: Gradient of the output, contiguous.
        gate: As in the forward.
        up: As in the forward.
        activation: As in the forward.
    """
    x, wide = gate.float(), grad.float()
    z, slope = _exponent(x, activation)
    sigmoid = torch.sigmoid(z)
    # The smallest factors first: x times its slope may be infinite where they are zero.
    slope = sigmoid + sigmoid * torch.sigmoid(-z) * x * slope
    grad_up = (x * sigmoid * wide).to(up.dtype)
    return (slope * wide).mul_(up).to(gate.dtype).contiguous(), grad_up.contiguous()


_BODIES = {
    "rms_norm": rms_norm_reference,
    "add_rms_norm": add_rms_norm_reference,
    "rms_norm_backward": rms_norm_backward_reference,
    "rotate_": rotate_reference,
    "gated": gated_reference,
    "gated_backward": gated_backward_reference,
}
for _name, _body in _BODIES.items():
    _library.impl(_name, _body, "CompositeExplicitAutograd")

rms_norm = torch.ops.halfbyte.rms_norm.default
add_rms_norm = torch.ops.halfbyte.add_rms_norm.default
rms_norm_backward = torch.ops.halfbyte.rms_norm_backward.default
rotate_ = torch.ops.halfbyte.rotate_.default
gated = torch.ops.halfbyte.gated.default
gated_backward = torch.ops.halfbyte.gated_backward.default


@torch.library.register_fake("halfbyte::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


@torch.library.register_fake("halfbyte::add_rms_norm")
def _(x: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.register_fake("halfbyte::rms_norm_backward")
def _(
    grad: Tensor,  # noqa: ARG001
    x: Tensor,
    weight: Tensor,
    carry: Tensor | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    want_weight: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(x.shape[-1] if want_weight else 0)


@torch.library.register_fake("halfbyte::rotate_")
def _(*_arguments: object, **_named: object) -> None:
    return None


@torch.library.register_fake("halfbyte::gated")
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:  # noqa: ARG001
    return gate.new_empty(gate.shape)


@torch.library.register_fake("halfbyte::gated_backward")
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)

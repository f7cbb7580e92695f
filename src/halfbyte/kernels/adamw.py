"""The AdamW update as an operator: the schema, and the one body that defines the result.

The body is the sequence of PyTorch operations that `torch.optim.AdamW` runs for one tensor, so
its bits are the same. Each element depends on its own values only, so an update in pieces gives
the bits of an update as a whole.

Semantics, an element at a time, in float32 once the scalars are rounded to it:
    p = p * decay
    m = fma(weight1, g - m, m)            if weight1 < 0.5, with weight1 = 1 - beta1
      = fma(weight1 - 1, g - m, g)        otherwise
    v = fma(weight2 * g, g, v * beta2)    with weight2 = 1 - beta2
    p = p + step_size * m / (sqrt(v) / correction + eps)
`fma` is one rounding, as in PyTorch's vector code on every machine with AVX2. `sqrt` is PyTorch's:
with MKL it is not the nearest float in one case of six, which is why kernels call it too.
"""

import torch
from torch import Tensor

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define(
    "adamw_step(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "float decay, float weight1, float beta2, float weight2, float correction, float eps, "
    "float step_size) -> ()"
)


def adamw_step_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    decay: float,
    weight1: float,
    beta2: float,
    weight2: float,
    correction: float,
    eps: float,
    step_size: float,
) -> None:
    """Update a parameter and its two moments in place, by the law above.

    Args:
        param: float32 `[N]`.
        grad: float32 `[N]`, not changed.
        exp_avg: First moment m, float32 `[N]`.
        exp_avg_sq: Second moment v, float32 `[N]`.
        decay: 1 - learning rate * weight decay.
        weight1: 1 - beta1.
        beta2: Decay of the second moment.
        weight2: 1 - beta2.
        correction: Square root of the second moment's bias correction, 1 - beta2^step.
        eps: Added to the denominator.
        step_size: -learning rate / (1 - beta1^step).
    """
    param.mul_(decay)
    exp_avg.lerp_(grad, weight1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=weight2)
    denominator = exp_avg_sq.sqrt().div_(correction).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=step_size)


_library.impl("adamw_step", adamw_step_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("halfbyte::adamw_step")
def _(*_args: object) -> None:
    return None

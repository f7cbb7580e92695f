"""Softmax cross-entropy with its gradient in place: schema, reference body, fake kernel.

Semantics, a row at a time, in float32:
    loss   = log(sum(exp(logits))) - logits[target]
    logits = grad_scale * (softmax(logits) - one_hot(target))
"""

import torch
from torch import Tensor

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("cross_entropy_(Tensor(a!) logits, Tensor targets, float grad_scale) -> Tensor")


def cross_entropy_reference(logits_NV: Tensor, targets_N: Tensor, grad_scale: float) -> Tensor:
    """The losses, float32 `[N]`; the logits become the gradient of `grad_scale` times their sum.

    Args:
        logits_NV: float32, contiguous; overwritten.
        targets_N: int64, 0 to V - 1.
        grad_scale: Multiplies the gradient.
    """
    picked_N1 = targets_N[:, None]
    lse_N1 = logits_NV.logsumexp(dim=1, keepdim=True)
    losses_N = (lse_N1 - logits_NV.gather(1, picked_N1))[:, 0]
    logits_NV.sub_(lse_N1).exp_()
    logits_NV.scatter_add_(1, picked_N1, torch.full_like(lse_N1, -1.0)).mul_(grad_scale)
    return losses_N


_library.impl("cross_entropy_", cross_entropy_reference, "CompositeExplicitAutograd")

cross_entropy_ = torch.ops.halfbyte.cross_entropy_.default


@torch.library.register_fake("halfbyte::cross_entropy_")
def _(logits: Tensor, targets: Tensor, grad_scale: float) -> Tensor:  # noqa: ARG001
    return logits.new_empty(logits.shape[0])

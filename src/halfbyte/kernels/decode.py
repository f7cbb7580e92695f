"""What a step of decoding does besides 4-bit products: schemas, reference bodies, fake kernels.

A step multiplies one row, or one for each sequence: PyTorch's products of 16-bit matrices are made
for many, and without 16-bit instructions they do not read a large weight at the speed of memory.

Semantics:
    linear_rows              y_TO = x_TI @ W_OI^T + bias_O
    single_query_attention   for each head h, which uses key-value head h // (H / G):
        s_j = scale * (q . k_j), with a softcap s_j = softcap * tanh(s_j / softcap)
        out = sum_j softmax(s)_j v_j
In float32 throughout, rounded once. Kernels sum in another order.

Dimension key:
    T  rows          H  query heads        S  keys
    I  inputs        G  key-value heads    D  features of a head
    O  outputs
"""

import torch
from torch import Tensor

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("linear_rows(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
_library.define(
    "single_query_attention(Tensor q, Tensor keys, Tensor values, float scale, "
    "float? softcap=None) -> Tensor"
)


def linear_rows_reference(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`[T, O]` in the dtype of `x`.

    Args:
        x_TI: float32, bfloat16 or float16.
        weight_OI: Of the same dtype; elements of a row are adjacent.
        bias_O: Of the same dtype, or None.
    """
    y_TO = x_TI.float() @ weight_OI.float().T
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)


def single_query_attention_reference(
    q_HD: Tensor, k_GSD: Tensor, v_GSD: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """`[H, D]` in the dtype of `q`.

    Args:
        q_HD: The query of the newest token, contiguous.
        k_GSD: All keys that it sees, its own included; features are adjacent.
        v_GSD: Their values.
        scale: Multiplies query-key products.
        softcap: Bound of the scores; None leaves them.
    """
    grouped = q_HD.float().view(k_GSD.shape[0], -1, q_HD.shape[1])
    scores = scale * (grouped @ k_GSD.float().mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.softmax(dim=-1) @ v_GSD.float()).view(q_HD.shape).to(q_HD.dtype)


_library.impl("linear_rows", linear_rows_reference, "CompositeExplicitAutograd")
_library.impl(
    "single_query_attention", single_query_attention_reference, "CompositeExplicitAutograd"
)

linear_rows = torch.ops.halfbyte.linear_rows.default
single_query_attention = torch.ops.halfbyte.single_query_attention.default


@torch.library.register_fake("halfbyte::linear_rows")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("halfbyte::single_query_attention")
def _(
    q: Tensor,
    keys: Tensor,  # noqa: ARG001
    values: Tensor,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    softcap: float | None = None,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(q)

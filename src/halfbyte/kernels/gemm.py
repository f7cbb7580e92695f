"""Products of two matrices: schemas, reference bodies, and which body runs.

PyTorch multiplies 16-bit matrices fast only where the processor multiplies 16-bit numbers. On all
others our kernels widen the factors to float32 as they pack them and multiply those: the products
of 16-bit numbers are exact there, and the sum is rounded once. They also make every product of two
factors of one 16-bit dtype that is wanted in float32, as the gradient of a float32 factor of an
adapter is: PyTorch would round it to 16 bits first.

Dimension key: M rows, K summed over, N columns.

Semantics:
    matmul_into_   c_MN = alpha * (a_MK @ b_KN) + beta * c_MN + bias_N
Sums are accumulated in float32 and rounded once, to the dtype of c.
"""

import torch
from torch import Tensor

from halfbyte.kernels import backends
from halfbyte.kernels.activations import activation
from halfbyte.kernels.decode import linear_rows

FEW_ROWS = 8
"""Packing the other factor pays from here on; below, it is read as it stands."""

_SIXTEEN_BITS = frozenset({torch.bfloat16, torch.float16})

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define(
    "matmul_into_(Tensor(a!) c, Tensor a, Tensor b, Tensor? bias, float alpha, float beta) -> ()"
)


def matmul_into_reference(
    c_MN: Tensor, a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None, alpha: float, beta: float
) -> None:
    """Write `alpha * a b + beta * c + bias` to `c`; what `c` holds is not read for beta = 0."""
    product_MN = (a_MK.float() @ b_KN.float()).mul_(alpha)
    if beta != 0:
        product_MN.add_(c_MN, alpha=beta)
    if bias_N is not None:
        product_MN += bias_N
    c_MN.copy_(product_MN)


_library.impl("matmul_into_", matmul_into_reference, "CompositeExplicitAutograd")

_matmul_into_ = torch.ops.halfbyte.matmul_into_.default


@torch.library.register_fake("halfbyte::matmul_into_")
def _(
    c: Tensor,  # noqa: ARG001
    a: Tensor,  # noqa: ARG001
    b: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    alpha: float,  # noqa: ARG001
    beta: float,  # noqa: ARG001
) -> None:
    return None


def matmul(
    a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """`a @ b + bias`, by whichever body is fastest here. Not differentiable.

    Args:
        a_MK: float32, bfloat16 or float16; any strides.
        b_KN: The same. PyTorch, where it runs, rounds `a` to the dtype of `b`.
        bias_N: Of the dtype of the result, or None.
        dtype: Of the result; by default that of `b`. Where PyTorch runs, the result is rounded to
            that of `b` first.

    Returns:
        `[M, N]`.
    """
    dtype = dtype or b_KN.dtype
    if multiplied_here(a_MK, b_KN, dtype):
        c_MN = activation(b_KN, (a_MK.shape[0], b_KN.shape[1]), dtype)
        _matmul_into_(c_MN, a_MK, b_KN, bias_N, 1.0, 0.0)
        return c_MN
    if _is_few_rows(a_MK, b_KN, dtype):
        return linear_rows(a_MK, b_KN.T, bias_N)  # type: ignore[no-any-return]
    if bias_N is None and a_MK.dtype == b_KN.dtype == dtype:
        return torch.mm(a_MK, b_KN, out=activation(b_KN, (a_MK.shape[0], b_KN.shape[1])))
    if bias_N is not None:
        return torch.addmm(bias_N.to(b_KN.dtype), a_MK.to(b_KN.dtype), b_KN).to(dtype)
    return (a_MK.to(b_KN.dtype) @ b_KN).to(dtype)


def matmul_add_(c_MN: Tensor, a_MK: Tensor, b_KN: Tensor, *, alpha: float = 1.0) -> None:
    """`c += alpha * (a @ b)`, by whichever body is fastest here. Not differentiable.

    Args:
        c_MN: Changed in place; elements of a row are adjacent.
        a_MK: Of the same dtype where PyTorch runs; any strides.
        b_KN: The same.
        alpha: Multiplies the product.
    """
    if multiplied_here(a_MK, b_KN, c_MN.dtype):
        _matmul_into_(c_MN, a_MK, b_KN, None, alpha, 1.0)
    else:
        c_MN.addmm_(a_MK, b_KN, alpha=alpha)


def matmul_into_(c_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """`c = a @ b` by our kernels, each of any dtype; for what `multiplied_here` says yes to.

    Args:
        c_MN: Overwritten; elements of a row are adjacent.
        a_MK: As in `matmul`.
        b_KN: As in `matmul`.
    """
    _matmul_into_(c_MN, a_MK, b_KN, None, 1.0, 0.0)


def _is_few_rows(a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype) -> bool:
    """Whether the product is one of few rows with a weight `[N, K]` that is read row by row."""
    return (
        a_MK.shape[0] < FEW_ROWS
        and a_MK.dtype == b_KN.dtype == dtype
        and a_MK.device.type == "cpu"
        and b_KN.stride(0) == 1
        and b_KN.dtype in backends.gemm_dtypes()
    )


def multiplied_here(a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether our kernels multiply these better than PyTorch.

    Args:
        a_MK: Any float dtype.
        b_KN: The same.
        dtype: Of the result; by default that of `b`.
    """
    if a_MK.device.type != "cpu":
        return False
    if dtype == torch.float32 and a_MK.dtype == b_KN.dtype and b_KN.dtype in _SIXTEEN_BITS:
        return backends.native_in_use()
    return a_MK.shape[0] >= FEW_ROWS and b_KN.dtype in backends.gemm_dtypes()

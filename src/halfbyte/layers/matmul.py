"""Products with a weight that may be in 4 bits, both ways.

Dimension key:
    T  tokens, packed        I  input features
    O  output features
"""

from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.kernels.gemm import matmul, matmul_add_, matmul_into_, multiplied_here
from halfbyte.kernels.linear import linear, linear_input_gradient
from halfbyte.layers.weights import Weight, as_tensor


def multiply(x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None) -> Tensor:
    """`x Wᵀ + bias`, `[T, O]`, in the dtype of `x`."""
    if isinstance(weight_OI, QuantizedTensor):
        return linear(x_TI, weight_OI, bias_O)
    if not multiplied_here(x_TI, weight_OI):
        weight_OI = as_tensor(weight_OI, x_TI.dtype)
    return matmul(x_TI, weight_OI.T, bias_O, dtype=x_TI.dtype)


def multiply_transposed(
    grad_TO: Tensor, weight_OI: Weight, dtype: torch.dtype | None = None
) -> Tensor:
    """`grad W`, `[T, I]`, what reaches the input of `multiply`; by default in the dtype of `grad`.

    Where `grad` has another dtype, it is rounded to that first unless our kernels multiply.
    """
    dtype = dtype or grad_TO.dtype
    if isinstance(weight_OI, QuantizedTensor):
        return linear_input_gradient(grad_TO.to(dtype), weight_OI)
    if not multiplied_here(grad_TO, weight_OI):
        grad_TO, weight_OI = grad_TO.to(dtype), as_tensor(weight_OI, dtype)
    return matmul(grad_TO, weight_OI, dtype=dtype)


def add_weight_gradient(total_OI: Tensor, grad_TO: Tensor, x_TI: Tensor) -> None:
    """`total += gradᵀ x`, float32, what reaches the weight of `multiply`.

    Where `grad` has another dtype than `x`, it is rounded to that first unless our kernels
    multiply.
    """
    if not multiplied_here(grad_TO.T, x_TI, total_OI.dtype):
        grad_TO = grad_TO.to(x_TI.dtype)
    if multiplied_here(grad_TO.T, x_TI, total_OI.dtype) or x_TI.dtype == total_OI.dtype:
        matmul_add_(total_OI, grad_TO.T, x_TI)
    else:
        total_OI += matmul(grad_TO.T, x_TI, dtype=torch.float32)


def write_product(out_TO: Tensor, x_TI: Tensor, weight_OI: Weight) -> None:
    """`out = x Wᵀ`, in the dtype of `out`; PyTorch, where it multiplies, rounds to that of `x`."""
    if isinstance(weight_OI, Tensor) and multiplied_here(x_TI, weight_OI):
        matmul_into_(out_TO, x_TI, weight_OI.T)
    elif isinstance(weight_OI, Tensor) and out_TO.dtype == x_TI.dtype == weight_OI.dtype:
        torch.mm(x_TI, weight_OI.T, out=out_TO)
    else:
        out_TO.copy_(multiply(x_TI, weight_OI))


def bind(weight_OI: Weight, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`multiply` without gradients, with all that can be looked up once looked up now.

    When a token is decoded, looking up the parts of a 4-bit weight would cost as much as
    multiplying with it.
    """
    biases: dict[torch.dtype, Tensor] = {}

    def bias_in(dtype: torch.dtype) -> Tensor | None:
        if bias_O is None:
            return None
        if dtype not in biases:
            biases[dtype] = bias_O.detach().to(dtype)
        return biases[dtype]

    if isinstance(weight_OI, Tensor):
        dense = weight_OI.detach()
        return lambda x_TI: matmul(x_TI, as_tensor(dense, x_TI.dtype).T, bias_in(x_TI.dtype))
    if weight_OI.stored_zero_points is not None:  # zero-points have no kernels
        return lambda x_TI: linear(x_TI, weight_OI, bias_in(x_TI.dtype))
    arguments = (*weight_OI.operator_arguments(), *weight_OI.shape)
    operator = torch.ops.halfbyte.linear_4bit.default
    below_autograd = torch._C._AutoDispatchBelowAutograd  # noqa: SLF001  (as `kernels.linear` does)

    def multiply_4bit(x_TI: Tensor) -> Tensor:
        with below_autograd():
            y_TO: Tensor = operator(x_TI, *arguments, bias_in(x_TI.dtype))
        return y_TO

    return multiply_4bit

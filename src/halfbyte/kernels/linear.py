"""Multiplication by a 4-bit weight: schemas, reference bodies, fake kernels and gradients.

Dimension key (one letter, one logical dimension, this file only):
    T  rows of the input, any number of leading dimensions     I  input features
    O  output features

Semantics:
    W_OI      = dequantize_4bit(weight) in the dtype of x, rounded as that operator rounds
    y_TO      = x_TI @ W_OI^T + bias_O          linear_4bit
    grad_TI   = grad_TO @ W_OI                  linear_4bit_input_gradient
Sums are accumulated in float32 (by PyTorch's matmul, in whatever it accumulates) and rounded once.
The native kernels multiply the same rounded weights; only the order of summation differs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.errors import FormatError
from halfbyte.formats.checks import FLOAT_DTYPES, describe, dtype_name
from halfbyte.formats.ops import dequantize_4bit_reference
from halfbyte.formats.quantized_tensor import QuantizedTensor

_WEIGHT = (
    "Tensor codes, Tensor table, Tensor scales, Tensor? nested_table, Tensor? nested_scales, "
    "float nested_offset, int nested_block_size, int block_size, int out_features, int in_features"
)
NUM_WEIGHT_ARGUMENTS = 10

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define(f"linear_4bit(Tensor x, {_WEIGHT}, Tensor? bias=None) -> Tensor")
_library.define(f"linear_4bit_input_gradient(Tensor gradient, {_WEIGHT}) -> Tensor")


def linear_4bit_reference(
    x_TI: Tensor,
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    nested_table: Tensor | None,
    nested_scales: Tensor | None,
    nested_offset: float,
    nested_block_size: int,
    block_size: int,
    out_features: int,
    in_features: int,
    bias_O: Tensor | None = None,
) -> Tensor:
    """`x @ W^T + bias`, the weight decoded to the dtype of `x`; `[..., O]`."""
    w_OI = x_TI.new_empty(out_features, in_features)
    nested = (nested_table, nested_scales, nested_offset, nested_block_size)
    dequantize_4bit_reference(codes, table, scales, *nested, block_size, w_OI)
    return functional.linear(x_TI, w_OI, bias_O)


def linear_4bit_input_gradient_reference(
    grad_TO: Tensor,
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    nested_table: Tensor | None,
    nested_scales: Tensor | None,
    nested_offset: float,
    nested_block_size: int,
    block_size: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """`gradient @ W`, the weight decoded to the dtype of `gradient`; `[..., I]`."""
    w_OI = grad_TO.new_empty(out_features, in_features)
    nested = (nested_table, nested_scales, nested_offset, nested_block_size)
    dequantize_4bit_reference(codes, table, scales, *nested, block_size, w_OI)
    return grad_TO @ w_OI


_library.impl("linear_4bit", linear_4bit_reference, "CompositeExplicitAutograd")
_library.impl(
    "linear_4bit_input_gradient", linear_4bit_input_gradient_reference, "CompositeExplicitAutograd"
)

_linear_4bit = torch.ops.halfbyte.linear_4bit.default
_linear_4bit_input_gradient = torch.ops.halfbyte.linear_4bit_input_gradient.default


@torch.library.register_fake("halfbyte::linear_4bit")
def _(x: Tensor, *weight: Any) -> Tensor:  # noqa: ANN401  (ten arguments, of which one matters)
    return x.new_empty((*x.shape[:-1], weight[NUM_WEIGHT_ARGUMENTS - 2]))


@torch.library.register_fake("halfbyte::linear_4bit_input_gradient")
def _(gradient: Tensor, *weight: Any) -> Tensor:  # noqa: ANN401
    return gradient.new_empty((*gradient.shape[:-1], weight[NUM_WEIGHT_ARGUMENTS - 1]))


def _keep_weight(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[object, ...],
    output: Tensor,  # noqa: ARG001
) -> None:
    # Codes and scales, which live as long as the weight does: nothing decoded, no copy.
    weight = inputs[1 : 1 + NUM_WEIGHT_ARGUMENTS]
    ctx.save_for_backward(*(a for a in weight if isinstance(a, Tensor)))
    ctx.weight = tuple(None if isinstance(a, Tensor) else a for a in weight)  # type: ignore[attr-defined]


def _kept_weight(ctx: torch.autograd.function.FunctionCtx) -> tuple[object, ...]:
    tensors = iter(ctx.saved_tensors)  # type: ignore[attr-defined]
    num_tensors = len(ctx.saved_tensors)  # type: ignore[attr-defined]
    # Five tensors when double-quantized, three when not: the two optional ones go together.
    places = (0, 1, 2, 3, 4)[:num_tensors]
    return tuple(
        next(tensors) if place in places else value
        for place, value in enumerate(ctx.weight)  # type: ignore[attr-defined]
    )


def _linear_backward(
    ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    for_x = _linear_4bit_input_gradient(gradient, *_kept_weight(ctx)) if needs[0] else None
    for_bias = None
    if needs[-1]:
        for_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0)
    return (for_x, *(None,) * NUM_WEIGHT_ARGUMENTS, for_bias)


def _input_gradient_backward(
    ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
) -> tuple[Tensor | None, ...]:
    return (_linear_4bit(gradient, *_kept_weight(ctx)), *(None,) * NUM_WEIGHT_ARGUMENTS)


torch.library.register_autograd(
    "halfbyte::linear_4bit", _linear_backward, setup_context=_keep_weight
)
torch.library.register_autograd(
    "halfbyte::linear_4bit_input_gradient", _input_gradient_backward, setup_context=_keep_weight
)


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer whose weight is held in 4 bits. Differentiable in `x` and `bias`.

    On a CPU with native kernels, few rows of `x` never see a decoded weight in memory, and many
    rows share one reused buffer (`kernels.workspace`).

    Args:
        x: `[..., I]` in float32, bfloat16 or float16; the weight is decoded to its dtype.
        weight: `[O, I]`.
        bias: `[O]` of the dtype of `x`, or None.

    Returns:
        `[..., O]` in the dtype of `x`.

    Raises:
        FormatError: Shapes or dtypes do not fit each other.
    """
    _require_fitting(x, weight, 1, "x")
    if weight.stored_zero_points is not None:  # zero-points have no kernels
        return functional.linear(x, weight.dequantize(dtype=x.dtype), bias)
    out_features, in_features = weight.shape
    arguments = (x, *weight.operator_arguments(), out_features, in_features, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        recorded: Tensor = _linear_4bit(*arguments)
        return recorded
    # Nothing to record: spare the Python of the autograd key, which costs as much as a small
    # layer's multiplication.
    with torch._C._AutoDispatchBelowAutograd():  # noqa: SLF001  (what torch.library itself uses)
        y: Tensor = _linear_4bit(*arguments)
    return y


def linear_input_gradient(gradient: Tensor, weight: QuantizedTensor) -> Tensor:
    """The gradient of `linear` with respect to `x`: `gradient @ weight`.

    Args:
        gradient: `[..., O]` in float32, bfloat16 or float16.
        weight: `[O, I]`.

    Returns:
        `[..., I]` in the dtype of `gradient`.

    Raises:
        FormatError: Shapes or dtypes do not fit each other.
    """
    _require_fitting(gradient, weight, 0, "gradient")
    if weight.stored_zero_points is not None:
        return gradient @ weight.dequantize(dtype=gradient.dtype)
    out_features, in_features = weight.shape
    arguments = weight.operator_arguments()
    result: Tensor = _linear_4bit_input_gradient(gradient, *arguments, out_features, in_features)
    return result


def _require_fitting(x: Tensor, weight: QuantizedTensor, dimension: int, name: str) -> None:
    shape = weight.shape
    fits = len(shape) == 2 and x.dim() > 0 and x.shape[-1] == shape[dimension]  # noqa: PLR2004
    if fits and x.dtype in FLOAT_DTYPES:
        return
    allowed = ", ".join(dtype_name(d) for d in FLOAT_DTYPES)
    width = shape[dimension] if len(shape) == 2 else "?"  # noqa: PLR2004
    raise FormatError(
        f"{name}: [..., {width}] in {allowed} expected for a 4-bit weight of shape "
        f"{list(shape)}, found {describe(x)}",
        hint="" if len(shape) == 2 else "A linear layer's weight has two dimensions.",  # noqa: PLR2004
    )

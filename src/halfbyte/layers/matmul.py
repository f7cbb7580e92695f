"""Products with a weight that may be in 4 bits, both ways.

Dimension key:
    T  tokens, packed        I  input features
    O  output features
"""

import threading

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.layers.weights import Weight, as_tensor


class _Workspace(threading.local):
    """One buffer a thread and dtype that dequantized weights pass through.

    A fresh buffer costs four times the dequantization in page faults.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = self.buffers.get((dtype, device))
        if buffer is None or buffer.numel() < shape.numel():
            buffer = torch.empty(shape.numel(), dtype=dtype, device=device)
            self.buffers[dtype, device] = buffer
        return buffer[: shape.numel()].view(shape)


_workspace = _Workspace()


def _dense(weight_OI: Weight, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`; from 4 bits it is valid until the next call only."""
    if isinstance(weight_OI, QuantizedTensor):
        out = _workspace.take(weight_OI.shape, dtype, weight_OI.device)
        return weight_OI.dequantize(out=out)
    return as_tensor(weight_OI, dtype)


def multiply(x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None) -> Tensor:
    """`x Wᵀ + bias`, `[T, O]`, in the dtype of `x`."""
    return functional.linear(x_TI, _dense(weight_OI, x_TI.dtype), bias_O)


def multiply_transposed(grad_TO: Tensor, weight_OI: Weight) -> Tensor:
    """`grad W`, `[T, I]`, in the dtype of `grad`: what reaches the input of `multiply`."""
    return grad_TO @ _dense(weight_OI, grad_TO.dtype)

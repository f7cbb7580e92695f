"""Checks that formats share, each with a message that says where the fault is."""

import torch
from torch import Tensor

from halfbyte.errors import FormatError

MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 32, 4096
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """The name without `torch.`, as files spell it."""
    return str(dtype).removeprefix("torch.")


def describe(tensor: Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def block_size_fault(block_size: int) -> str | None:
    """Why `block_size` is not allowed, or None when it is."""
    if (
        not isinstance(block_size, int)
        or block_size & (block_size - 1)
        or not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE
    ):
        return (
            f"block_size: a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE} expected, "
            f"found {block_size!r}"
        )
    return None


def require_block_size(block_size: int) -> None:
    """Raise unless `block_size` is a power of two from 32 to 4096."""
    if fault := block_size_fault(block_size):
        raise FormatError(fault)


def require_float(x: Tensor, name: str) -> None:
    """Raise unless `x` is a dense tensor of a dtype that can be quantized."""
    if x.layout != torch.strided or x.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(dtype_name(d) for d in FLOAT_DTYPES)
        raise FormatError(
            f"{name}: a dense tensor of {allowed} expected, found {describe(x)}",
            hint="Convert it first: `weight.float()`.",
        )


def require_finite(x: Tensor, name: str) -> None:
    """Raise an error that names the first NaN or infinity of `x` and counts them."""
    if not torch.isfinite(x).all():
        raise FormatError(
            nonfinite_fault(x, name),
            hint="Weights must be finite: the checkpoint is damaged or its training diverged.",
        )


def nonfinite_fault(x: Tensor, name: str) -> str:
    """Where the first NaN or infinity of `x`, which must hold one, is, and how many there are."""
    bad = (~torch.isfinite(x)).reshape(-1)
    first = int(bad.to(torch.uint8).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(first), x.shape)]
    return (
        f"{name} holds {int(bad.sum())} NaN or infinite values of {x.numel()}; "
        f"the first is {x.reshape(-1)[first].item()} at index {index}"
    )

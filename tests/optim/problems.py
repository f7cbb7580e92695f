"""Parameters of many sizes and gradients that are the same in every run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHAPES = [(1000,), (257, 33), (3,), (4096 * 3 + 5,), (64, 64), (1, 1), (128, 100)]
PAGE = 4096
NUM_PAGES = 60  # at least so many in 32 bits; see test_paging

Params = list[torch.nn.Parameter]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 1) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
    ]


def gradients(params: Params, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        scale = 10.0 ** (-step % 5)
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def run(
    optimizer: Any, params: Params, steps: range, between: Callable[[int], None] | None = None
) -> None:
    for step in steps:
        gradients(params, step)
        if between is not None:
            between(step)
        optimizer.step()


def assert_same(a: Params | list[Tensor], b: Params | list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y), tuple(x.shape)

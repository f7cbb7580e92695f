"""Parts that are computed again in their backward."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from halfbyte.layers.recompute import recomputed


def make_part() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6), nn.ReLU())


@pytest.mark.parametrize("input_has_gradient", [True, False])
def test_gradients_are_those_of_torch(*, input_has_gradient: bool) -> None:
    gradients = []
    for run in (
        lambda part, x: part(x),
        recomputed,
        lambda part, x: checkpoint(part, x, use_reentrant=False),
    ):
        first, second = make_part(), make_part()
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        x.requires_grad_(input_has_gradient)
        run(second, run(first, x)).square().sum().backward()
        params = [*first.parameters(), *second.parameters(), *([x] if input_has_gradient else [])]
        gradients.append([param.grad for param in params])
    plain, ours, torchs = gradients
    for expected, found, other in zip(plain, ours, torchs, strict=True):
        assert expected is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(other, expected, rtol=0, atol=0)


def test_only_the_input_is_kept_and_the_end_is_left_out() -> None:
    ran: list[str] = []
    alive: list[int] = []

    def part(x: Tensor) -> Tensor:
        ran.append("product")
        y = x * weight
        ran.append("sine")
        z = y.sin()
        ran.append("sum")  # saves nothing, so nothing needs it again
        return z + 1

    def count_alive(gradient: Tensor) -> Tensor:
        alive.append(len(ran))
        return gradient

    weight = torch.randn(1000, requires_grad=True)
    x = torch.randn(1000, requires_grad=True)
    out = recomputed(part, x)
    assert ran == ["product", "sine", "sum"]
    out.register_hook(count_alive)
    out.sum().backward()
    assert alive == [3]
    assert ran == ["product", "sine", "sum", "product", "sine"]


@pytest.mark.parametrize("fault", ["other", "fewer"])
def test_a_part_that_saves_something_else_is_noticed(fault: str) -> None:
    ran: list[int] = []

    def part(x: Tensor) -> Tensor:
        ran.append(1)
        if len(ran) == 1:
            return (x * weight).sin()
        return x * weight[:1] if fault == "other" else x * weight

    weight = torch.randn(10, requires_grad=True)
    out = recomputed(part, torch.randn(10, requires_grad=True))
    with pytest.raises(AssertionError, match="saved other tensors"):
        out.sum().backward()


def test_without_gradients_it_runs_once() -> None:
    part = make_part()
    with torch.no_grad():
        x = torch.randn(5, 6)
        assert torch.equal(recomputed(part, x), part(x))


_BACKWARD = """
import sys
import torch
from halfbyte.layers.recompute import recomputed
x = torch.ones(3, requires_grad=True)
recomputed(torch.sin, x).sum().backward()
print("torch._dynamo" in sys.modules)
"""


def test_no_compiler_is_imported() -> None:
    command = [sys.executable, "-c", _BACKWARD]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"

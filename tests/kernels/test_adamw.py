"""The native AdamW step against the reference body, bit for bit."""

import pytest
import torch
from torch import Tensor

from halfbyte.kernels.adamw import adamw_step_reference

native = torch.ops.halfbyte
SCALARS = [
    pytest.param((1 - 3e-4, 1 - 0.9, 0.999, 1 - 0.999, 0.03, 1e-8, -3e-3), id="usual"),
    pytest.param((1.0, 0.7, 0.5, 0.5, 0.9, 1e-6, -1e-2), id="from-the-gradient"),
    pytest.param((0.9, 1.0, 0.0, 1.0, 1.0, 0.0, -1.0), id="no-memory"),
]
COUNTS = [0, 1, 3, 15, 17, 4096, 65_536, 65_537, 200_003]

# PyTorch's vector code fuses its multiply-adds where the machine can; its plain code does not.
pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in {"AVX2", "AVX512"},
    reason="PyTorch runs code here that rounds products by themselves",
)


def tensors(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    param, grad, moment, square = (torch.randn(count, generator=generator) for _ in range(4))
    return [param, grad * 1e-2, moment * 1e-3, square.square() * 1e-5]


@pytest.mark.parametrize("scalars", SCALARS)
@pytest.mark.parametrize("count", COUNTS)
def test_every_bit_is_the_references(isa: str, count: int, scalars: tuple[float, ...]) -> None:
    ours, reference = tensors(count), tensors(count)
    native.adamw_step(*ours, *scalars)
    adamw_step_reference(*reference, *scalars)
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 0.0, 1e-45, 3e38])
def test_special_gradients(isa: str, special: float) -> None:
    ours, reference = tensors(100), tensors(100)
    for each in (ours, reference):
        each[1][7::9] = special
        each[3][9::9] = 0.0
        native_or_reference = native.adamw_step if each is ours else adamw_step_reference
        native_or_reference(*each, 1 - 3e-4, 0.1, 0.999, 0.001, 0.03, 1e-8, -3e-3)
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


@pytest.mark.parametrize("cuts", [(0, 1, 2, 5, 17), (0, 50_000, 65_536, 70_001)])
def test_pieces_give_the_bits_of_the_whole(isa: str, cuts: tuple[int, ...]) -> None:
    whole, pieces = tensors(100_000), tensors(100_000)
    scalars = (1 - 3e-4, 0.1, 0.999, 0.001, 0.03, 1e-8, -3e-3)
    native.adamw_step(*whole, *scalars)
    for begin, end in zip(cuts, (*cuts[1:], 100_000), strict=True):
        native.adamw_step(*(each[begin:end] for each in pieces), *scalars)
    for a, b in zip(whole, pieces, strict=True):
        assert torch.equal(a, b)


def test_threads_change_no_bit(isa: str) -> None:
    one, two = tensors(200_003), tensors(200_003)
    scalars = (1 - 3e-4, 0.1, 0.999, 0.001, 0.03, 1e-8, -3e-3)
    native.adamw_step(*one, *scalars)
    torch.set_num_threads(2)
    native.adamw_step(*two, *scalars)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_wrong_arguments_are_all_named() -> None:
    param, grad, moment, square = tensors(10)
    with pytest.raises(RuntimeError, match="adamw_step") as caught:
        native.adamw_step(param, grad[:9], moment.double(), square, 1, 0.1, 0.9, 0.1, 1, 0, -1)
    assert "grad" in str(caught.value)
    assert "exp_avg:" in str(caught.value)


def test_the_operator_is_well_formed() -> None:
    arguments = (*tensors(100), 1.0, 0.1, 0.9, 0.1, 1.0, 1e-8, -1e-3)
    torch.library.opcheck(native.adamw_step.default, arguments)

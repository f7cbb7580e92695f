"""RMSNorm, gated activations and rotation: own backwards against those of autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.layers.activation import ACTIVATIONS, gated
from halfbyte.layers.norm import add_rms_norm, rms_norm
from halfbyte.layers.rotary import RotarySpec, inverse_frequencies, rotary_table, rotate

# Unit roundoff of the dtype times the roundings that reach a result: one for the result itself
# (bfloat16, float16), or a few float32 operations in another order.
TOLERANCE = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def assert_same_with_gradients(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """Values and gradients: `theirs` in float64 through autograd is the truth."""
    low = [x.clone().requires_grad_() for x in inputs]
    high = [x.double().requires_grad_() for x in inputs]
    found, expected = ours(*low), theirs(*high)
    weights = normals(*found.shape, seed=99)
    (found.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    tolerance = TOLERANCE[inputs[0].dtype]
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(low, high, strict=True))]
    for a, b in pairs:
        assert a is not None
        assert b is not None
        assert (a.double() - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())
    with torch.no_grad():
        assert torch.equal(ours(*low), found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 48), (3, 4, 17), (1, 1)], ids=str)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = 1 + 0.3 * normals(shape[-1], seed=1)
    assert_same_with_gradients(
        lambda x, w: rms_norm(x, w.float(), 1e-5),
        lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w,
        [normals(*shape, dtype=dtype), weight],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", ["both", "sum", "normal"])
def test_sum_and_norm(dtype: torch.dtype, part: str) -> None:
    weight = 1 + 0.3 * normals(17, seed=1)

    def chosen(total: Tensor, normal: Tensor) -> Tensor:
        return {"both": total + normal, "sum": total, "normal": normal}[part]

    def written_out(x: Tensor, update: Tensor, w: Tensor) -> Tensor:
        total = x + update
        # The sum is rounded before it is normalized, here as there.
        total = total + (total.to(dtype).double() - total).detach()
        return chosen(total, total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w)

    def ours(x: Tensor, update: Tensor, w: Tensor) -> Tensor:
        # Added in float64: `chosen` must not round a third time.
        return chosen(*(t.double() for t in add_rms_norm(x, update, w.float(), 1e-5)))

    inputs = [normals(3, 4, 17, dtype=dtype), normals(3, 4, 17, seed=2, dtype=dtype)]
    if part == "sum":  # the weight has no part in it
        frozen = weight
        assert_same_with_gradients(
            lambda x, u: ours(x, u, frozen), lambda x, u: written_out(x, u, frozen), inputs
        )
    else:
        assert_same_with_gradients(ours, written_out, [*inputs, weight])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_activation(dtype: torch.dtype, name: str) -> None:
    gate, up = 2 * normals(7, 33, dtype=dtype), normals(7, 33, seed=1, dtype=dtype)
    plain = {
        "silu": functional.silu,
        "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }[name]
    assert_same_with_gradients(
        lambda g, u: gated(g, u, name), lambda g, u: plain(g) * u, [gate, up]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation(dtype: torch.dtype) -> None:
    frequencies = inverse_frequencies(RotarySpec(100.0), 10)
    cosine, sine = rotary_table(frequencies, torch.tensor([0, 3, 500, 7]), 1.25)

    def complex_rotation(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., :5], x[..., 5:]) * torch.complex(cosine, sine)
        return torch.cat((turned.real, turned.imag), dim=-1)

    assert_same_with_gradients(
        lambda x: rotate(x, cosine, sine), complex_rotation, [normals(4, 3, 10, dtype=dtype)]
    )


def test_rotation_of_a_strided_view() -> None:
    cosine, sine = rotary_table(
        inverse_frequencies(RotarySpec(100.0), 8), torch.tensor([2, 5]), 1.0
    )
    x = normals(3, 2, 8).transpose(0, 1)
    assert torch.equal(rotate(x, cosine, sine), rotate(x.contiguous(), cosine, sine))

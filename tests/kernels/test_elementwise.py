"""Native norms, rotations and activations, and the reference bodies, against float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import backends
from halfbyte.kernels.elementwise import (
    add_rms_norm,
    add_rms_norm_reference,
    gated,
    gated_backward,
    gated_backward_reference,
    gated_reference,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_reference,
    rotate_,
    rotate_reference,
)

ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SMALLEST = {torch.float32: 2**-149, torch.bfloat16: 2**-133, torch.float16: 2**-24}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDE = ROUNDOFF[torch.float32]
ACTIVATIONS = ["silu", "gelu_pytorch_tanh"]


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_within(found: Tensor, exact: Tensor, bound: Tensor) -> None:
    """`bound` for float32 arithmetic; rounding to the dtype of `found` comes on top."""
    assert found.shape == exact.shape
    rounding = ROUNDOFF[found.dtype] * exact.abs() + SMALLEST[found.dtype]
    assert ((found.double() - exact).abs() <= bound + rounding).all()


SHAPES = [(1, 1), (1, 576), (7, 33), (2, 3, 64), (150, 100), (0, 5)]


def norm_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, update, grad, carry = (normals(*shape, seed=seed).to(dtype) for seed in range(4))
    return x, update, 1 + 0.3 * normals(shape[-1], seed=4), grad, carry


def check_norm(shape: tuple[int, ...], dtype: torch.dtype, bodies: dict[str, Callable]) -> None:  # type: ignore[type-arg]
    """The sum of D squares is off by at most (D + 1) u, its root by half that; then a few u."""
    eps = 1e-5
    x, update, weight, grad, carry = norm_inputs(shape, dtype)
    relative = (shape[-1] / 2 + 8) * WIDE
    total, out = bodies["add_rms_norm"](x, update, weight, eps)
    assert torch.equal(total, x + update)
    for given, found in ((x, bodies["rms_norm"](x, weight, eps)), (total, out)):
        wide = given.double()
        inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        exact = wide * inverse * weight
        assert_within(found, exact, relative * exact.abs())
    leaf, leaf_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    normal = leaf * (leaf.square().mean(-1, keepdim=True) + eps).rsqrt()
    (normal * leaf_weight).backward(grad.double())
    inverse = (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    scaled = (grad.double() * weight).abs()
    normal = normal.detach().abs()
    # With magnitudes in the place of values; the mean is one more sum of D products.
    size = (scaled + normal * (scaled * normal).mean(-1, keepdim=True)) * inverse
    assert leaf.grad is not None
    assert leaf_weight.grad is not None
    for carried in (None, carry):
        found_x, found_weight = bodies["rms_norm_backward"](grad, x, weight, carried, eps, True)
        exact = leaf.grad if carried is None else leaf.grad + carried.double()
        extra = 0 if carried is None else WIDE * carried.double().abs()
        assert_within(found_x, exact, 4 * relative * size + WIDE * exact.abs() + extra)
        rows = x.numel() // shape[-1]
        summed = (grad.double().abs() * normal).flatten(0, -2).sum(0)
        assert_within(found_weight, leaf_weight.grad, (relative + (rows + 4) * WIDE) * summed)
        assert found_weight.dtype == torch.float32
    alone, nothing = bodies["rms_norm_backward"](grad, x, weight, None, eps, False)
    assert nothing.shape == (0,)
    assert torch.equal(alone, bodies["rms_norm_backward"](grad, x, weight, None, eps, True)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_norms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    bodies = {
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "rms_norm_backward": rms_norm_backward,
    }
    check_norm(shape, dtype, bodies)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_norms(dtype: torch.dtype) -> None:
    bodies = {
        "rms_norm": rms_norm_reference,
        "add_rms_norm": add_rms_norm_reference,
        "rms_norm_backward": rms_norm_backward_reference,
    }
    check_norm((7, 33), dtype, bodies)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_rms_norm_of_extremes(dtype: torch.dtype) -> None:
    largest = 2.0**15 if dtype == torch.float16 else 2.0**60
    x = torch.tensor([[0.0, 0.0, 0.0], [largest, -largest, 0.0]], dtype=dtype)
    expected = torch.tensor([[0.0, 0.0, 0.0], [1.5**0.5, -(1.5**0.5), 0.0]]).double()
    assert_within(rms_norm(x, torch.ones(3), 1e-6), expected, 8 * WIDE * expected.abs())
    x[0, 1] = torch.nan
    assert rms_norm(x, torch.ones(3), 1e-6).isnan()[0].all()


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    pairs = torch.complex(*x.double().chunk(2, dim=-1)) * torch.complex(*(cosine, sine))
    return torch.cat((pairs.real, pairs.imag), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2), (1, 9, 64), (5, 3, 10), (300, 4, 64), (0, 2, 4), (3, 1, 42)], ids=str
)
@pytest.mark.parametrize("body", [rotate_, rotate_reference], ids=["native", "reference"])
@pytest.mark.usefixtures("isa")
def test_rotation(
    dtype: torch.dtype, shape: tuple[int, int, int], body: Callable[..., None]
) -> None:
    angles = (normals(shape[0], 1, shape[2] // 2, seed=2) * 10).double()
    cosine, sine = angles.cos().float(), angles.sin().float()
    x = normals(*shape).to(dtype)
    for inverse in (False, True):
        found = x.clone()
        body(found, cosine, sine, inverse)
        exact = turned(x, cosine.double(), -sine.double() if inverse else sine.double())
        # Two products and their sum, each rounded, which may cancel.
        size = sum(part.double().abs() for part in x.chunk(2, dim=-1))
        assert_within(found, exact, 3 * WIDE * torch.cat((size, size), dim=-1))


@pytest.mark.usefixtures("isa")
def test_rotation_where_the_heads_are() -> None:
    angles = normals(6, 1, 5, seed=2)
    x = normals(6, 3, 10)
    expected = x.clone()
    rotate_(expected, angles.cos(), angles.sin())
    wide = torch.full((6, 5, 12), 7.0)
    wide[:, 1:4, 1:11] = x
    rotate_(wide[:, 1:4, 1:11], angles.cos(), angles.sin())
    assert torch.equal(wide[:, 1:4, 1:11], expected)
    wide[:, 1:4, 1:11] = 7.0
    assert (wide == 7.0).all()


def activation_truth(
    name: str, gate: Tensor, up: Tensor, grad: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients in float64, and bounds.

    exp2 is within 2^-23 and its argument, of size |z| log2(e), within a few u: together a relative
    error of (|z| + 8) u for e^-z. Of the sigmoid s that reaches the share 1 - s, a few u come on
    top, and of 1 - s the share s.
    """
    leaves = [x.double().requires_grad_() for x in (gate, up)]
    x = leaves[0]
    if name == "silu":
        z, slope = x, torch.ones_like(x)
    else:
        twice = 2 * (2 / torch.pi) ** 0.5
        z, slope = twice * (x + 0.044715 * x**3), twice * (1 + 3 * 0.044715 * x**2)
    sigmoid = torch.sigmoid(z)
    out = x * sigmoid * leaves[1]
    out.backward(grad.double())
    values = [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    s, z, x, slope = (t.detach() for t in (sigmoid, z, x, slope))
    error = 8 * (z.abs() + 8) * WIDE * s * torch.sigmoid(-z) + 4 * WIDE * s
    a_up, a_grad = up.double().abs(), grad.double().abs()
    inner = 1 + x.abs() * torch.sigmoid(-z) * slope
    bend = error * inner + s * x.abs() * slope * (error + 8 * WIDE) + 8 * WIDE * s * inner
    return values, [
        (x.abs() * error + 4 * WIDE * x.abs() * s) * a_up,
        bend * a_up * a_grad,
        (x.abs() * error + 4 * WIDE * x.abs() * s) * a_grad,
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.usefixtures("isa")
def test_gated_activation(dtype: torch.dtype, name: str, native: bool) -> None:
    forward, backward = (
        (gated, gated_backward) if native else (gated_reference, gated_backward_reference)
    )
    for shape, size in (((1, 1), 1.0), ((7, 133), 3.0), ((2, 3, 64), 30.0), ((0, 4), 1.0)):
        gate = (size * normals(*shape)).to(dtype)
        up, grad = normals(*shape, seed=1).to(dtype), normals(*shape, seed=2).to(dtype)
        values, bounds = activation_truth(name, gate, up, grad)
        found = [forward(gate, up, name), *backward(grad, gate, up, name)]
        for ours, exact, bound in zip(found, values, bounds, strict=True):
            assert ours.dtype == dtype
            # The product of tiny factors may underflow to zero in float32.
            assert_within(ours, exact, bound + 2**-120)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.usefixtures("isa")
def test_activations_of_extremes(name: str) -> None:
    gate = torch.tensor([0.0, -0.0, 200.0, -200.0, 1e15, -1e15, torch.inf, torch.nan, 1.0])
    up = torch.ones(9)
    out = gated(gate, up, name)
    assert torch.equal(out[:7], torch.tensor([0.0, 0.0, 200.0, 0.0, 1e15, 0.0, torch.inf]))
    assert out[7].isnan()
    assert out[8].isfinite()  # beside a NaN in the same register
    grad_gate, grad_up = gated_backward(up, gate, up, name)
    assert torch.equal(grad_gate[:6], torch.tensor([0.5, 0.5, 1.0, 0.0, 1.0, 0.0]))
    assert torch.equal(grad_up[:6], out[:6])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.usefixtures("isa")
def test_an_element_is_the_same_wherever_it_stands(name: str) -> None:
    # In whole registers and in the rest of a row, in rows of a wider matrix and in dense ones.
    gate, up, grad = (3 * normals(5, 77, seed=seed) for seed in range(3))
    both = torch.cat((gate, up), dim=1)
    views = (both[:, :77], both[:, 77:])
    assert torch.equal(gated(*views, name), gated(gate, up, name))
    assert torch.equal(gated(gate.flatten(), up.flatten(), name), gated(gate, up, name).flatten())
    for found, expected in zip(
        gated_backward(grad, *views, name), gated_backward(grad, gate, up, name), strict=True
    ):
        assert torch.equal(found, expected)
    single = [
        gated(g, u, name)
        for g, u in zip(gate.flatten().split(1), up.flatten().split(1), strict=True)
    ]
    assert torch.equal(torch.cat(single), gated(gate, up, name).flatten())


@pytest.mark.usefixtures("isa")
def test_threads_change_nothing() -> None:
    x, weight, grad = normals(700, 200), normals(200), normals(700, 200, seed=1)
    angles = normals(700, 1, 20, seed=2)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        spun = x.view(700, 5, 40).clone()
        rotate_(spun, angles.cos(), angles.sin())
        found.append(
            [
                spun,
                rms_norm(x, weight, 1e-5),
                *rms_norm_backward(grad, x, weight, None, 1e-5, True),
                gated(x, grad, "silu"),
                *gated_backward(grad, x, grad, "silu"),
            ]
        )
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def test_operators_are_sound() -> None:
    angles = normals(3, 1, 4)
    x, weight = normals(3, 8), normals(8)
    torch.library.opcheck(rms_norm, (x, weight, 1e-5))
    torch.library.opcheck(add_rms_norm, (x, x + 1, weight, 1e-5))
    torch.library.opcheck(rms_norm_backward, (x, x + 1, weight, x + 2, 1e-5, True))
    torch.library.opcheck(rotate_, (normals(3, 2, 8), angles.cos(), angles.sin(), True))
    torch.library.opcheck(gated, (x, x + 1, "silu"))
    torch.library.opcheck(gated_backward, (x, x + 1, x + 2, "silu"))


needs_native = pytest.mark.skipif(not backends.native_in_use(), reason="native kernels are absent")
X = normals(3, 8)


@needs_native
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (rms_norm, (X, normals(7), 1e-5), "weight: contiguous, aligned Float with 8 elements"),
        (rms_norm, (normals(3, 16)[:, ::2], normals(8), 1e-5), "x: contiguous"),
        (rms_norm, (torch.ones(()), normals(1), 1e-5), "features: at least 1"),
        (rms_norm, (X.double(), normals(8), 1e-5), "x: .*float32, bfloat16 or float16"),
        (add_rms_norm, (X, normals(3, 7), normals(8), 1e-5), "update: .* 24 elements"),
        (add_rms_norm, (X, normals(8, 3), normals(8), 1e-5), "update: the shape "),
        (add_rms_norm, (X, X.bfloat16(), normals(8), 1e-5), "update: .*Float"),
        (rms_norm_backward, (X.T, X, normals(8), None, 1e-5, True), "grad: contiguous"),
        (rms_norm_backward, (X, X, normals(8), X[:2], 1e-5, True), "carry: .* 24 elements"),
        (rotate_, (normals(3, 2, 7), X, X), r"x: \[T, H, 2 F\]"),
        (rotate_, (normals(4, 2, 8), X, X), r"(?s)cosine: .* 16 elements.*sine"),
        (rotate_, (normals(3, 8).expand(2, 3, 8), X, X), "tokens apart"),
        (rotate_, (normals(3, 8, 2).mT, X, X), "consecutive features"),
        (gated, (X, normals(3, 7), "silu"), r"up: .* like gate Float \[3, 8\]"),
        (gated, (X, X.bfloat16(), "silu"), "up: .* like gate"),
        (gated, (X, X, "relu"), "activation: silu or gelu_pytorch_tanh expected, found relu"),
        (gated, (X.T, X.T, "silu"), "gate: contiguous, or"),
        (gated, (torch.ones(()), torch.ones(()), "silu"), "gate: at least one dimension"),
        (gated_backward, (X.T, X, X, "silu"), "grad: contiguous"),
        (gated_backward, (X[:2], X, X, "silu"), "grad: .* 24 elements"),
    ],
)
def test_what_does_not_fit_is_refused(
    op: Callable[..., object], arguments: tuple[object, ...], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        op(*arguments)

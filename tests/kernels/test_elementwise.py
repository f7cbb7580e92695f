"""Native RMSNorm and rotation against their reference bodies."""

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import backends
from halfbyte.kernels.elementwise import (
    rms_norm,
    rms_norm_reference,
    rotate_,
    rotate_reference,
)

# One rounding to the dtype, on either side of the same float32 value but for its own rounding.
TOLERANCE = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    error = (found.double() - expected.double()).abs()
    assert (error <= TOLERANCE[found.dtype] * expected.double().abs().clamp(min=2**-10)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 576), (7, 33), (2, 3, 64), (40, 2048), (0, 5)], ids=str
)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = normals(*shape).to(dtype), normals(shape[-1], seed=1)
    assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_extremes(dtype: torch.dtype) -> None:
    largest = 2.0**15 if dtype == torch.float16 else 2.0**60
    x = torch.tensor([[0.0, 0.0, 0.0], [largest, -largest, 0.0]], dtype=dtype)
    assert_close(rms_norm(x, torch.ones(3), 1e-6), rms_norm_reference(x, torch.ones(3), 1e-6))
    x[0, 1] = torch.nan
    assert rms_norm(x, torch.ones(3), 1e-6).isnan()[0].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2), (1, 9, 64), (5, 3, 10), (300, 4, 64), (0, 2, 4)], ids=str
)
def test_rotation(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    angles = normals(shape[0], 1, shape[2] // 2, seed=2) * 10
    x = normals(*shape).to(dtype)
    expected = x.clone()
    rotate_reference(expected, angles.cos(), angles.sin())
    rotate_(x, angles.cos(), angles.sin())
    # A difference of products may cancel: the error is relative to the operands.
    error = (x.double() - expected.double()).abs()
    assert (error <= TOLERANCE[dtype] * 8).all()


def test_threads_change_nothing() -> None:
    x, weight = normals(300, 200), normals(200)
    angles = normals(300, 1, 20, seed=2)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        turned = x.view(300, 5, 40).clone()
        rotate_(turned, angles.cos(), angles.sin())
        found.append((rms_norm(x, weight, 1e-5), turned))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_operators_are_sound() -> None:
    angles = normals(3, 1, 4)
    torch.library.opcheck(rms_norm, (normals(3, 8), normals(8), 1e-5))
    torch.library.opcheck(rotate_, (normals(3, 2, 8), angles.cos(), angles.sin()))


@pytest.mark.skipif(not backends.native_in_use(), reason="needs the native kernels")
def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RuntimeError, match="weight: contiguous, aligned Float with 8 elements"):
        rms_norm(normals(3, 8), normals(7), 1e-5)
    with pytest.raises(RuntimeError, match="x: contiguous"):
        rms_norm(normals(3, 16)[:, ::2], normals(8), 1e-5)
    angles = normals(3, 1, 4)
    with pytest.raises(RuntimeError, match=r"x: \[T, H, 2 F\]"):
        rotate_(normals(3, 2, 7), angles.cos(), angles.sin())
    with pytest.raises(RuntimeError, match=r"(?s)cosine.*sine"):
        rotate_(normals(4, 2, 8), angles.cos(), angles.sin())

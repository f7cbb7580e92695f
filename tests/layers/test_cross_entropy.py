"""The chunked loss against torch's, forward and backward."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import halfbyte as hb
from halfbyte.errors import UsageError
from halfbyte.kernels import activations, backends
from halfbyte.kernels.cross_entropy import cross_entropy_
from halfbyte.layers.cross_entropy import (
    Head,
    default_chunk_rows,
    linear_cross_entropy,
    score_targets,
)
from halfbyte.layers.weights import ResidentStore, Weight, WeightRef

N, D, V = 23, 40, 301


def normals(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_head(weight: Weight, softcap: float | None = None) -> Head:
    return Head(WeightRef("w", (V, D)), ResidentStore({"w": weight}), softcap)


def expected_loss(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    logits = x @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, targets, reduction="sum")


TARGETS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))

# Logits of magnitude about 6 rounded to the dtype: each loss is off by at most a few units.
TOLERANCE = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0], ids=str)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("chunk_rows", [1, 5, 23, None], ids=str)
def test_loss_and_gradients(
    dtype: torch.dtype, softcap: float | None, trainable: bool, chunk_rows: int | None
) -> None:
    x = normals(N, D, seed=0).to(dtype).requires_grad_()
    weight = normals(V, D, seed=1).to(dtype).requires_grad_(trainable)
    x_twin = x.detach().double().requires_grad_()
    weight_twin = weight.detach().double().requires_grad_()
    loss = linear_cross_entropy(x, TARGETS, make_head(weight, softcap), chunk_rows=chunk_rows)
    expected = expected_loss(x_twin, weight_twin, TARGETS, softcap)
    assert loss.dtype == torch.float32
    assert abs(loss.double() - expected) <= 8 * TOLERANCE[dtype] * N
    (loss / N).backward()
    (expected / N).backward()
    assert x.grad is not None
    assert x_twin.grad is not None
    # Probabilities are off by as much as logits are, relatively; sums over V of those products.
    assert (x.grad - x_twin.grad).abs().max() <= 16 * TOLERANCE[dtype] * x_twin.grad.abs().max()
    if trainable:
        assert weight.grad is not None
        assert weight_twin.grad is not None
        error = (weight.grad - weight_twin.grad).abs().max()
        assert error <= 16 * TOLERANCE[dtype] * weight_twin.grad.abs().max()
    else:
        assert weight.grad is None


def test_float16_gradients_are_scaled_before_they_are_rounded() -> None:
    # Every target is predicted with a margin of 16: the others' probabilities, 1.1e-7, are two
    # units of float16 unless the factor that the caller will apply is applied to them first.
    size, scale = 32, 2.0**12
    store = ResidentStore({"w": 4 * torch.eye(size).half()})
    head = Head(WeightRef("w", (size, size)), store)
    others = ~torch.eye(size, dtype=torch.bool)
    errors = []
    for grad_scale in (scale, 1.0):
        x = (4 * torch.eye(size)).half().requires_grad_()
        loss = linear_cross_entropy(x, torch.arange(size), head, grad_scale=grad_scale)
        (loss * scale).backward()
        assert x.grad is not None
        errors.append((x.grad[others] / (4 * scale * math.exp(-16.0)) - 1).abs().max())
    assert errors[0] < 2**-9
    assert errors[1] > 0.05


def test_an_announced_scale_is_applied_once() -> None:
    # 1 / 41 in float32 is not the number announced: their ratio, in float32, is not 1.
    scale = 1 / 41
    assert torch.tensor(torch.tensor(scale).item() / scale) != 1
    x = normals(N, D, seed=0).requires_grad_()
    weight = normals(V, D, seed=1).requires_grad_()
    loss = linear_cross_entropy(x, TARGETS, make_head(weight), grad_scale=scale, chunk_rows=N)
    (loss * scale).backward()
    logits = x.detach() @ weight.detach().T
    cross_entropy_(logits, TARGETS, scale)
    assert x.grad is not None
    assert weight.grad is not None
    assert torch.equal(x.grad, logits @ weight.detach())
    assert torch.equal(weight.grad, logits.T @ x.detach())


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scores_of_targets(softcap: float | None) -> None:
    x, weight = normals(N, D, seed=0), normals(V, D, seed=1)
    head = make_head(weight, softcap)
    scores = score_targets(x, TARGETS, head, chunk_rows=4)
    logits = x @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(
        scores.losses, functional.cross_entropy(logits, TARGETS, reduction="none")
    )
    best = logits.argmax(dim=1)
    assert torch.equal(scores.correct, best == TARGETS)
    assert score_targets(x, best, head).correct.all()


def test_a_four_bit_head() -> None:
    quantized = hb.quantize(normals(V, D, seed=1))
    x = normals(N, D, seed=0).requires_grad_()
    loss = linear_cross_entropy(x, TARGETS, make_head(quantized), chunk_rows=7)
    dense = make_head(quantized.dequantize())
    torch.testing.assert_close(loss, linear_cross_entropy(x, TARGETS, dense, chunk_rows=7))


def test_no_targets_cost_nothing() -> None:
    x = normals(0, D, seed=0).requires_grad_()
    loss = linear_cross_entropy(x, TARGETS[:0], make_head(normals(V, D, seed=1)))
    loss.backward()
    assert loss == 0
    assert len(score_targets(x, TARGETS[:0], make_head(normals(V, D, seed=1))).losses) == 0


class _Logits(torch.utils._python_dispatch.TorchDispatchMode):
    """The tensors of logits that operators return, by address, with their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape[1:] == (V,) and len(out) != D:
            self._alive.append(out)
            address = out.untyped_storage().data_ptr()
            self.rows[address] = max(self.rows.get(address, 0), out.shape[0])
        return out


def test_one_chunk_of_logits_exists() -> None:
    head = make_head(normals(V, D, seed=1))
    x = normals(N, D, seed=0).requires_grad_()
    with _Logits() as trained:
        linear_cross_entropy(x, TARGETS, head, chunk_rows=6).backward()
    assert list(trained.rows.values()) == [6]
    with _Logits() as scored:
        score_targets(x, TARGETS, head, chunk_rows=6)
    assert list(scored.rows.values()) == [6]


def test_default_chunk() -> None:
    assert default_chunk_rows(49152) == 341
    assert default_chunk_rows(10**9) == 1


def test_misfits_are_listed_together() -> None:
    head = make_head(normals(V, D, seed=1))
    with pytest.raises(UsageError, match=r"(?s)2 problems.*x: \[N, 40\].*targets: int64 \[23\]"):
        linear_cross_entropy(normals(N, D + 1, seed=0), TARGETS[:5], head)
    with pytest.raises(UsageError, match="0 to 300 expected, found -100 to"):
        score_targets(normals(N, D, seed=0), TARGETS - TARGETS.min() - 100, head)


@pytest.mark.skipif(not backends.native_in_use(), reason="native kernels are absent")
def test_logits_are_not_kept_beyond_the_loss() -> None:
    """Whoever watches the head's weight come back sees the memory that the backward begins with."""
    kept: list[int] = []

    class Watched(ResidentStore):
        def release(self, ref: WeightRef) -> None:
            kept.append(activations.usage().kept)
            super().release(ref)

    head = Head(WeightRef("w", (V, D)), Watched({"w": normals(V, D, seed=1)}))
    x = normals(N, D, seed=0).requires_grad_()
    with activations.reusing(least=4096):
        before = activations.usage().fresh
        linear_cross_entropy(x, TARGETS, head).backward()
        assert activations.usage().fresh - before >= 4 * N * V
    assert kept == [0]

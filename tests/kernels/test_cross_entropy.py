"""Cross-entropy with its gradient in place, against float64, on every path."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels import backends
from halfbyte.kernels.cross_entropy import cross_entropy_, cross_entropy_reference

pytestmark = pytest.mark.skipif(not backends.native_in_use(), reason="native kernels are absent")


def problem(rows: int, classes: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + classes)
    logits = torch.randn(rows, classes, generator=generator) * spread
    return logits, torch.randint(0, classes, (rows,), generator=generator)


def require_close(logits: Tensor, targets: Tensor, scale: float) -> None:
    """Against float64.

    An exponential is off by 2^-23 of it, and by the rounding of its argument, which is 2^-24 of
    at most 100; the sum of up to 2^16 in 64 chains by 2^-14 of 2^-24 a step: below 2^-16 in all.
    The loss adds the rounding of two logits.
    """
    wide = logits.double().requires_grad_()
    expected = functional.cross_entropy(wide, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum() * scale, wide)
    for body in (cross_entropy_, cross_entropy_reference):
        found = logits.clone()
        losses = body(found, targets, scale)
        bound = 2**-16 + 2**-22 * logits.abs().amax(dim=1)
        assert ((losses - expected).abs() <= bound).all()
        # The target's entry is a difference: it is off by the rounding of the scale as well.
        relative = 2**-16 + 2**-22 * logits.abs().amax()
        assert ((found - gradient).abs() <= relative * gradient.abs() + 2**-22 * scale).all()


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (2, 16), (5, 63), (4, 64), (4, 65), (7, 1000), (2, 49152)], ids=str
)
def test_losses_and_gradients(isa: str, shape: tuple[int, int]) -> None:
    require_close(*problem(*shape), 1.0)
    require_close(*problem(*shape), 2.0**-7)


def test_extremes(isa: str) -> None:
    logits, targets = problem(4, 200)
    logits[0] = 0.0
    logits[1] *= 10
    logits[2] += 1e4
    logits[3, targets[3]] = -90.0
    require_close(logits, targets, 1.0)


def test_what_is_not_finite_stays_so(isa: str) -> None:
    for value in (torch.nan, torch.inf):
        logits, targets = problem(3, 150)
        logits[1, 77] = value
        losses = cross_entropy_(logits, targets, 1.0)
        assert losses.isfinite().tolist() == [True, False, True]
        assert logits.isfinite().all(dim=1).tolist() == [True, False, True]
    logits, targets = problem(1, 150)
    logits[0, (targets[0] + 1) % 150] = -torch.inf  # a masked class
    assert cross_entropy_(logits, targets, 1.0).isfinite().all()
    assert logits[0, (targets[0] + 1) % 150] == 0


def test_threads_change_no_bit(isa: str) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        logits, targets = problem(33, 777)
        results.append((cross_entropy_(logits, targets, 0.5), logits))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_the_schema_is_what_it_says() -> None:
    torch.library.opcheck(cross_entropy_, (*problem(3, 20), 0.5))


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.int64), "logits: a matrix"),
        (torch.ones(3, 0), torch.zeros(3, dtype=torch.int64), "logits: a matrix"),
        (torch.ones(3, 4).half(), torch.zeros(3, dtype=torch.int64), "logits: .* Float"),
        (torch.ones(3, 8)[:, ::2], torch.zeros(3, dtype=torch.int64), "logits: contiguous"),
        (torch.ones(3, 4), torch.zeros(2, dtype=torch.int64), "targets: .* 3 elements"),
        (torch.ones(3, 4), torch.zeros(3), "targets: .* Long"),
        (torch.ones(3, 4), torch.tensor([0, 4, 1]), "targets: 0 to 3 expected, found 4"),
        (torch.ones(3, 4), torch.tensor([0, -1, 1]), "targets: 0 to 3 expected, found -1"),
    ],
)
def test_the_operator_names_the_wrong_argument(
    logits: Tensor, targets: Tensor, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        cross_entropy_(logits, targets, 1.0)

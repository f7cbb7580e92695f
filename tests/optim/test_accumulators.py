"""Gradients in pages are those in `.grad`, bit for bit: norms, clipping, steps, state."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError
from halfbyte.optim import AdamW, PagedAdamW
from halfbyte.optim.accumulators import Accumulator, Lender, PagedAccumulator
from optim.problems import PAGE, Params, assert_same, parameters

STEPS, MICRO_BATCHES = 4, 3


def loss_of(params: Params, number: int) -> Tensor:
    """Gradients of all signs, with zeros of both signs among them, and one parameter used twice."""
    generator = torch.Generator().manual_seed(number)
    total = params[0].new_zeros(())
    for param in params:
        factors = torch.randn(param.shape, generator=generator).relu().to(param.dtype)
        total = total + (param * factors).sum() - (param.square() * factors).sum()
    return total - params[1].sum()


def train(
    params: Params,
    optimizer: AdamW,
    *,
    loss_scale: float = 1.0,
    max_norm: float | None = 1.0,
    between: Callable[[int], None] = lambda _: None,
    lend: Lender | None = None,
) -> list[Tensor]:
    """Take steps and return their norms."""
    accumulator = optimizer.accumulator()
    return [
        one_step(params, optimizer, accumulator, step, loss_scale, max_norm, between, lend)
        for step in range(STEPS)
    ]


def one_step(
    params: Params,
    optimizer: AdamW,
    accumulator: Accumulator,
    step: int,
    loss_scale: float,
    max_norm: float | None,
    between: Callable[[int], None],
    lend: Lender | None = None,
) -> Tensor:
    accumulator.begin(loss_scale)
    for number in range(step * MICRO_BATCHES, (step + 1) * MICRO_BATCHES):
        between(number)
        if number % MICRO_BATCHES == MICRO_BATCHES - 1:
            accumulator.expect_step(lend)
        (loss_of(params, number) * loss_scale).backward()
    norm = accumulator.finish(max_norm)
    optimizer.step()
    return norm


def paged(params: Params, bits: int, pages: int) -> PagedAdamW:
    return PagedAdamW(params, lr=1e-2, state_bits=bits, fast_bytes=pages * PAGE, page_bytes=PAGE)


def assert_same_bits(ours: AdamW, theirs: AdamW) -> None:
    """All state, the sign of zeros included, which `torch.equal` does not see."""
    found, expected = ours.state_tensors(), theirs.state_tensors()
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].numpy().tobytes() == expected[name].numpy().tobytes(), name


@pytest.mark.parametrize(("loss_scale", "max_norm"), [(1.0, None), (2.0**10, 0.5)])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("pages", [2, 3, 13, 1000])
def test_every_budget_gives_the_same_bits(
    bits: int, pages: int, loss_scale: float, max_norm: float | None
) -> None:
    expected, oracle = parameters(), None
    oracle = AdamW(expected, lr=1e-2, state_bits=bits)
    norms = train(expected, oracle, loss_scale=loss_scale, max_norm=max_norm)
    params = parameters()
    optimizer = paged(params, bits, pages)
    found = train(params, optimizer, loss_scale=loss_scale, max_norm=max_norm)
    assert torch.equal(torch.stack(found), torch.stack(norms))
    assert_same(params, expected)
    assert_same_bits(optimizer, oracle)
    assert all(param.grad is None for param in params)
    assert optimizer.stats().peak_resident_bytes <= pages * PAGE


@pytest.mark.parametrize("pages", [2, 3, 13])
def test_what_backwards_give_up_spares_gradients_the_slow_tier(pages: int) -> None:
    expected = parameters()
    oracle = AdamW(expected, lr=1e-2)
    norms = train(expected, oracle)
    asked: list[tuple[int, int]] = []

    def lend(wanted: int, keep: int) -> int:
        asked.append((wanted, keep))
        return wanted

    params = parameters()
    optimizer = paged(params, 32, pages)
    found = train(params, optimizer, lend=lend)
    assert torch.equal(torch.stack(found), torch.stack(norms))
    assert_same(params, expected)
    assert_same_bits(optimizer, oracle)
    assert len(asked) == STEPS * len(params)
    wanted, keep = asked[-1]
    assert wanted >= optimizer.stats().total_bytes - pages * PAGE
    assert keep == 2 * max(param.nbytes for param in params)
    assert optimizer.stats().resident_bytes <= pages * PAGE
    plain_params = parameters()
    plain = paged(plain_params, 32, pages)
    train(plain_params, plain)
    assert optimizer.stats().paged_out_bytes < plain.stats().paged_out_bytes
    assert optimizer.stats().paged_in_bytes < plain.stats().paged_in_bytes


def test_nothing_is_borrowed_where_the_budget_holds_all() -> None:
    def lend(wanted: int, keep: int) -> int:
        raise AssertionError((wanted, keep))

    params = parameters()
    train(params, paged(params, 32, 1000), lend=lend)


def test_a_step_that_is_not_taken_repays() -> None:
    pages = 3
    params = parameters()
    optimizer = paged(params, 32, pages)
    accumulator = optimizer.accumulator()
    accumulator.begin()
    accumulator.expect_step(lambda _, __: 2**30)
    loss_of(params, 0).backward()
    assert optimizer.stats().resident_bytes > pages * PAGE
    accumulator.begin()
    assert optimizer.stats().resident_bytes <= pages * PAGE


def test_budgets_that_change_between_micro_batches() -> None:
    expected = parameters()
    oracle = AdamW(expected, lr=1e-2)
    norms = train(expected, oracle)
    params = parameters()
    optimizer = paged(params, 32, 30)
    budgets = [30, 2, 5, 100, 3, 2, 60, 9, 2, 4, 1000, 7]
    found = train(params, optimizer, between=lambda n: optimizer.set_fast_bytes(budgets[n] * PAGE))
    assert torch.equal(torch.stack(found), torch.stack(norms))
    assert_same_bits(optimizer, oracle)


def test_state_taken_over_before_the_first_gradient() -> None:
    """As on resume: the state is there before gradients are."""
    expected, params = parameters(), parameters()
    oracle, optimizer = AdamW(expected, lr=1e-2), paged(params, 32, 3)
    train(expected, oracle)
    optimizer.load_state_tensors({k: v.clone() for k, v in oracle.state_tensors().items()})
    with torch.no_grad():
        for param, other in zip(params, expected, strict=True):
            param.copy_(other)
    train(expected, oracle)
    train(params, optimizer)
    assert_same(params, expected)
    assert_same_bits(optimizer, oracle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bits_add_up_as_pytorch_adds_them(dtype: torch.dtype) -> None:
    expected, params = parameters(dtype), parameters(dtype)
    oracle, optimizer = AdamW(expected, lr=1e-2), paged(params, 32, 4)
    norms = train(expected, oracle)
    assert torch.equal(torch.stack(train(params, optimizer)), torch.stack(norms))
    assert_same(params, expected)
    assert_same_bits(optimizer, oracle)


def test_a_gradient_can_be_looked_at() -> None:
    expected, params = parameters(), parameters()
    theirs = AdamW(expected).accumulator()
    ours = paged(params, 32, 2).accumulator()
    for each, some in ((theirs, expected), (ours, params)):
        each.begin(4.0)
        (loss_of(some[:5], 1) * 4).backward()
        each.finish(0.25)
    for one, other in zip(params[:5], expected[:5], strict=True):
        found, wanted = ours.of(one), theirs.of(other)
        assert found is not None
        assert wanted is not None
        assert torch.equal(found, wanted)
    assert ours.of(params[-1]) is theirs.of(expected[-1]) is None


def test_parameters_without_a_gradient_keep_value_and_state() -> None:
    params = parameters()
    optimizer = paged(params, 32, 2)
    train(params, optimizer)
    before = params[-1].clone()
    state = optimizer.state_tensors()["6.exp_avg"].clone()
    loss_of(params[:-1], 1).backward()
    optimizer.step()
    assert torch.equal(params[-1], before)
    assert torch.equal(optimizer.state_tensors()["6.exp_avg"], state)
    assert optimizer.state_tensors()["6.step"] == STEPS
    assert optimizer.state_tensors()["5.step"] == STEPS + 1


def test_gradients_given_by_hand_are_taken_by_the_step() -> None:
    expected, params = parameters(), parameters()
    oracle, optimizer = AdamW(expected, lr=1e-2), paged(params, 32, 2)
    optimizer.accumulator()
    for one, other in zip(params, expected, strict=True):
        one.grad, other.grad = torch.ones_like(one), torch.ones_like(other)
    oracle.step()
    optimizer.step()
    assert_same(params, expected)


def test_a_step_uses_gradients_up_and_zero_grad_forgets_them() -> None:
    params = parameters()
    optimizer = paged(params, 32, 2)
    optimizer.accumulator()
    loss_of(params, 1).backward()
    optimizer.step()
    before = [param.clone() for param in params]
    optimizer.step()
    loss_of(params, 2).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert_same(params, before)
    assert optimizer.state_tensors()["0.step"] == 1


def test_a_sparse_gradient_is_refused() -> None:
    params = [torch.nn.Parameter(torch.zeros(8, 3))]
    optimizer = PagedAdamW(params, fast_bytes=2 * PAGE, page_bytes=PAGE)
    optimizer.accumulator()
    looked_up = torch.nn.functional.embedding(torch.tensor([1]), params[0], sparse=True)
    with pytest.raises(UnsupportedError, match="sparse"):
        looked_up.sum().backward()


def test_hooks_can_be_removed_and_end_with_the_optimizer() -> None:
    params = parameters()
    optimizer = paged(params, 32, 2)
    accumulator = optimizer.accumulator()
    assert isinstance(accumulator, PagedAccumulator)
    assert optimizer.accumulator() is accumulator
    accumulator.close()
    loss_of(params, 1).backward()
    assert all(param.grad is not None for param in params)
    other = parameters()
    optimizer = paged(other, 32, 2)
    optimizer.accumulator()
    del optimizer
    loss_of(other, 1).backward()
    assert all(param.grad is not None for param in other)

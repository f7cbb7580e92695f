"""Paged is unpaged, bit for bit: for every budget, with budgets that change, across a resume."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import UnsupportedError, UsageError
from halfbyte.optim import (
    SGD,
    AdamW,
    AdamW8bit,
    Lion,
    PagedAdamW,
    PagedAdamW8bit,
    Paging,
    make_optimizer,
)
from optim.problems import PAGE, Params, assert_same, parameters, run

STEPS = 5


def unpaged(bits: int) -> tuple[Params, AdamW]:
    params = parameters()
    optimizer = AdamW(params, lr=1e-2, state_bits=bits)
    run(optimizer, params, range(STEPS))
    return params, optimizer


def paged(params: Params, bits: int, pages: int) -> PagedAdamW:
    return PagedAdamW(params, lr=1e-2, state_bits=bits, fast_bytes=pages * PAGE, page_bytes=PAGE)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("pages", [2, 3, 5, 13, 40, 1000])
def test_every_budget_gives_the_same_bits(bits: int, pages: int) -> None:
    expected, oracle = unpaged(bits)
    params = parameters()
    optimizer = paged(params, bits, pages)
    run(optimizer, params, range(STEPS))
    assert_same(params, expected)
    theirs = oracle.state_tensors()
    ours = optimizer.state_tensors()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    stats = optimizer.stats()
    assert stats.peak_resident_bytes <= pages * PAGE
    if pages == 2:
        assert stats.total_bytes > 10 * pages * PAGE if bits == 32 else 3 * pages * PAGE
        assert stats.paged_in_bytes > 0
        assert stats.paged_out_bytes > 0


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("seed", range(3))
def test_budgets_that_change_give_the_same_bits(bits: int, seed: int) -> None:
    expected, _ = unpaged(bits)
    params = parameters()
    optimizer = paged(params, bits, 9)
    rng = random.Random(seed)  # noqa: S311

    def change(_step: int) -> None:
        optimizer.set_fast_bytes(rng.choice([2, 3, 7, 30, 200]) * PAGE)
        optimizer.prefetch()

    run(optimizer, params, range(STEPS), change)
    assert_same(params, expected)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("how", ["state_tensors", "state_dict"])
def test_paging_continues_after_a_resume(bits: int, how: str) -> None:
    expected, _ = unpaged(bits)
    params = parameters()
    first = paged(params, bits, 3)
    run(first, params, range(2))
    second = paged(params, bits, 2)
    if how == "state_tensors":
        second.load_state_tensors({k: v.clone() for k, v in first.state_tensors().items()})
    else:
        second.load_state_dict(first.state_dict())
    before = second.stats().paged_in_bytes
    run(second, params, range(2, STEPS))
    assert_same(params, expected)
    assert second.stats().paged_in_bytes > before
    assert second.stats().peak_resident_bytes <= 2 * PAGE


def test_threads_change_no_bit() -> None:
    """PyTorch cuts a tensor among threads at places of its own, as pages do."""
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        param = torch.nn.Parameter(torch.linspace(-1, 1, 100_003))
        optimizer = PagedAdamW([param], lr=1e-2, fast_bytes=2**19, page_bytes=2**18)
        for step in range(2):
            param.grad = torch.sin(param.detach() * (step + 7))
            optimizer.step()
        results.append(param)
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", [Lion, SGD])
@pytest.mark.parametrize("bits", [8, 32])
def test_other_optimizers_page_too(kind: Any, bits: int) -> None:
    expected, params = parameters(), parameters()
    run(kind(expected, lr=1e-3, state_bits=bits), expected, range(3))
    paging = Paging(2 * PAGE, page_bytes=PAGE)
    run(kind(params, lr=1e-3, state_bits=bits, paging=paging), params, range(3))
    assert_same(params, expected)


def test_the_named_variants_are_what_their_names_say() -> None:
    params = parameters()
    for optimizer, bits, paged_ in (
        (AdamW8bit(params, lr=1e-2), 8, False),
        (PagedAdamW(params, lr=1e-2, fast_bytes=2**23), 32, True),
        (PagedAdamW8bit(params, lr=1e-2, fast_bytes=2**23), 8, True),
        (make_optimizer("adamw", params, lr=1e-2), 32, False),
        (make_optimizer("adamw_8bit", params, lr=1e-2), 8, False),
        (make_optimizer("paged_adamw", params, lr=1e-2, fast_bytes=2**23), 32, True),
        (make_optimizer("paged_adamw_8bit", params, lr=1e-2, fast_bytes=2**23), 8, True),
    ):
        run(optimizer, params, range(1))
        assert any("exp_avg_codes" in name for name in optimizer.state_tensors()) == (bits == 8)
        assert optimizer.param_groups[0]["lr"] == 1e-2
        assert ("file" in optimizer.stats().slow_tier) == paged_


def test_the_budget_adapts_to_what_others_need(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = paged(params, 32, 30)
    run(optimizer, params, range(1))
    monkeypatch.setattr(optimizer._store._tier, "free_bytes", lambda: 10 * PAGE)
    assert optimizer.make_room(20 * PAGE) == 20 * PAGE
    assert optimizer.stats().resident_bytes == 20 * PAGE
    assert optimizer.make_room(0) == 30 * PAGE


def test_a_resident_optimizer_has_no_budget() -> None:
    optimizer = AdamW(parameters())
    optimizer.prefetch()
    with pytest.raises(UsageError, match="no budget"):
        optimizer.set_fast_bytes(2**30)
    with pytest.raises(UsageError, match="no budget"):
        optimizer.make_room(0)


def test_what_cannot_page_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="2 pages"):
        PagedAdamW(parameters(), fast_bytes=1000)
    with pytest.raises(UsageError, match="no directory"):
        PagedAdamW(parameters(), fast_bytes=2**23, directory=Path("/nowhere"))
    meta = [torch.nn.Parameter(torch.empty(3, device="meta"))]
    with pytest.raises(UnsupportedError, match="no paging for parameters on meta"):
        PagedAdamW(meta, fast_bytes=2**23)


_STEP = """
import sys
import torch
from halfbyte.optim import PagedAdamW, make_optimizer
param = torch.nn.Parameter(torch.ones(8))
for optimizer in (PagedAdamW([param], fast_bytes=2**19), make_optimizer("adamw", [param])):
    gradients = optimizer.accumulator()
    gradients.begin()
    (param * param).sum().backward()
    gradients.finish(max_norm=1.0)
    optimizer.step()
print("torch._dynamo" in sys.modules)
"""


def test_no_compiler_is_imported() -> None:
    """It would take 72 MB, and a second, of every run."""
    done = subprocess.run([sys.executable, "-c", _STEP], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"

"""8-bit state: bytes, quantization against bitsandbytes, and whether it trains."""

from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.formats.codebooks import DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP
from halfbyte.optim import AdamW, AdamW8bit, Lion
from optim.problems import gradients, parameters, run


def test_state_takes_at_most_30_percent() -> None:
    params = [torch.nn.Parameter(torch.randn(512, 512)), torch.nn.Parameter(torch.randn(512))]
    full, small = AdamW(params), AdamW8bit(params)
    run(full, params, range(1))
    run(small, params, range(1))
    assert full.state_bytes == 8 * (512 * 512 + 512)
    assert small.state_bytes <= 0.3 * full.state_bytes
    held = sum(t.nbytes for name, t in small.state_tensors().items() if not name.endswith("step"))
    assert held == small.state_bytes


def test_small_tensors_stay_in_float32() -> None:
    params = [torch.nn.Parameter(torch.randn(4095)), torch.nn.Parameter(torch.randn(4096))]
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(1))
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    names = {"exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales"}
    assert set(optimizer.state[params[1]]) == {"step", *names}


def test_one_step_is_the_float32_step_then_quantization() -> None:
    ours, theirs = parameters(), parameters()
    small, full = AdamW8bit(ours, lr=1e-2), AdamW(theirs, lr=1e-2)
    run(small, ours, range(1))
    run(full, theirs, range(1))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b), "the first step starts from zeros, so it has no error"
        if a.numel() < 4096:
            continue
        for moment, codebook in (("exp_avg", DYNAMIC_MAP), ("exp_avg_sq", UNSIGNED_DYNAMIC_MAP)):
            state = small.state[a]
            exact = full.state[b][moment].reshape(-1)
            codes, scales = torch.ops.halfbyte.quantize_8bit(exact, codebook.table(), 256)
            assert torch.equal(state[f"{moment}_codes"].reshape(-1), codes)
            assert torch.equal(state[f"{moment}_scales"], scales)


def decoded(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    out = torch.empty(codes.shape)
    torch.ops.halfbyte.dequantize_8bit(codes.reshape(-1), table, scales, 256, out)
    return out.reshape(-1)


def test_state_is_quantized_as_bitsandbytes_does() -> None:
    """From the same moments: the same scales, and codes that are the same or better.

    On a CPU bitsandbytes finds its code in a table of 65,536 steps over [-1, 1], 2^-15 each: a
    value is taken for one up to a step away. Ours is the nearest, so it differs at
    boundaries and, for second moments, among the entries below a step.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes.optim")
    ours, theirs, exact = parameters(), parameters(), parameters()
    small = AdamW8bit(ours, lr=1e-2, weight_decay=0.1)
    oracle = bitsandbytes.AdamW8bit(theirs, lr=1e-2, weight_decay=0.1)
    full = AdamW(exact, lr=1e-2, weight_decay=0.1)
    run(small, ours, range(1))
    run(oracle, theirs, range(1))
    run(full, exact, range(1))
    compared = 0
    for a, b, c in zip(ours, theirs, exact, strict=True):
        if a.numel() < 4096:
            continue  # float32 state, and a body that rounds differently
        assert torch.equal(a, b), "the first update is from zero moments: no difference in rounding"
        for moment, place, codebook, apart in (
            ("exp_avg", 1, DYNAMIC_MAP, 0.005),
            ("exp_avg_sq", 2, UNSIGNED_DYNAMIC_MAP, 0.05),
        ):
            codes, scales = small.state[a][f"{moment}_codes"], small.state[a][f"{moment}_scales"]
            their_codes = oracle.state[b][f"state{place}"]
            assert torch.equal(scales, oracle.state[b][f"absmax{place}"])
            assert (codes != their_codes).float().mean() < apart
            value = full.state[c][moment].reshape(-1)
            table = codebook.table()
            error = (decoded(codes, scales, table) - value).abs()
            their_error = (decoded(their_codes, scales, table) - value).abs()
            step = scales.repeat_interleave(256)[: value.numel()] * 2**-15
            rounding = step * 2**-7  # of decoding, relative to values up to 2^15 steps
            assert (error <= their_error + rounding).all()
            assert (their_error <= error + 2 * step + rounding).all()
            compared += value.numel()
    assert compared > 60_000


def small_problem(make: Any, steps: int = 60) -> float:
    """Least squares through a hidden layer; returns the loss on held-out rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    y = torch.tanh(x @ torch.randn(64, 64, generator=generator) / 8)
    first = torch.nn.Parameter(torch.randn(128, 64, generator=generator) / 8)
    second = torch.nn.Parameter(torch.randn(64, 128, generator=generator) / 12)
    optimizer = make([first, second])
    for step in range(steps):
        rows = slice(step % 6 * 64, step % 6 * 64 + 64)
        optimizer.zero_grad()
        (torch.relu(x[rows] @ first.T) @ second.T - y[rows]).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return (torch.relu(x[384:] @ first.T) @ second.T - y[384:]).square().mean().item()


def test_it_trains_as_float32_and_as_bitsandbytes_do() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes.optim")
    settings: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.01}
    full = small_problem(lambda params: AdamW(params, **settings))
    ours = small_problem(lambda params: AdamW8bit(params, **settings))
    theirs = small_problem(lambda params: bitsandbytes.AdamW8bit(params, **settings))
    start = small_problem(lambda params: AdamW(params, **settings), steps=0)
    assert full < 0.5 * start, "the problem is one that can be learned"
    assert ours == pytest.approx(full, rel=0.02)
    assert ours == pytest.approx(theirs, rel=0.02)


def test_lion_is_that_of_bitsandbytes() -> None:
    """float32 moments may differ by a rounding, which matters where the sign's argument is zero."""
    bitsandbytes = pytest.importorskip("bitsandbytes.optim")
    ours, theirs = parameters(), parameters()
    run(Lion(ours, lr=1e-3, weight_decay=0.1), ours, range(4))
    oracle = bitsandbytes.Lion(theirs, lr=1e-3, weight_decay=0.1)
    for step in range(4):
        gradients(theirs, step)
        oracle.step()
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).abs() > 1e-6).float().mean() < 1e-3

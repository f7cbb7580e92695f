"""Factors that begin as a low-rank approximation, against exact singular values and PEFT."""

from typing import Any

import pytest
import torch

import halfbyte as hb
from halfbyte.adapters.modules import attach
from halfbyte.adapters.principal import principal_factors
from halfbyte.adapters.spec import LoraShape
from halfbyte.errors import ConfigError

SHAPE = LoraShape(rank=8, alpha=24.0, use_rslora=False)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_white_noise_keeps_nearly_all_of_the_best_energy() -> None:
    matrix = random(192, 320)
    a, b = principal_factors(matrix, SHAPE, path="p", seed=0)
    assert a.shape == (8, 320)
    assert b.shape == (192, 8)
    best = torch.linalg.svdvals(matrix)[:8].square().sum()
    assert (SHAPE.scaling * b @ a).square().sum() > 0.99 * best
    error = (matrix - SHAPE.scaling * b @ a).square().sum()
    assert error < matrix.square().sum() - 0.99 * best
    again = principal_factors(matrix, SHAPE, path="p", seed=0)
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])


def test_no_global_random_numbers_are_drawn() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    principal_factors(random(32, 40), SHAPE, path="p", seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_a_rank_above_the_smaller_side_is_filled_with_zeros() -> None:
    matrix = random(4, 40)
    a, b = principal_factors(matrix, SHAPE, path="p", seed=0)
    assert a.shape == (8, 40)
    assert not a[4:].any()
    assert not b[:, 4:].any()
    # Exact but for rounding: float32 sums of 4 products of numbers below 4.
    torch.testing.assert_close(SHAPE.scaling * b @ a, matrix, rtol=0, atol=1e-5)


def test_the_error_of_quantizing_is_approximated_as_by_peft() -> None:
    bitsandbytes: Any = pytest.importorskip("bitsandbytes")
    loftq: Any = pytest.importorskip("peft.utils.loftq_utils")
    weight = random(96, 128) * 0.05
    quantized = hb.quantize(weight, "nf4", double_quant=False)
    theirs, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    residual = weight - bitsandbytes.functional.dequantize_4bit(theirs, state)
    found = loftq._low_rank_decomposition(residual, reduced_rank=8)
    shape = LoraShape(rank=8, alpha=8.0, use_rslora=False)  # PEFT leaves the scaling out
    a, b = principal_factors(weight - quantized.dequantize(), shape, path="p", seed=0)
    # 24 directions of 96 are iterated on 8 times: what is missed of the eighth is below 1 %.
    gap = (b @ a - found["L"] @ found["R"]).norm() / (b @ a).norm()
    assert gap < 0.1
    assert (residual - b @ a).norm() < 1.001 * (residual - found["L"] @ found["R"]).norm()


def test_attaching_with_loftq_brings_a_module_closer_to_what_it_was() -> None:
    def error(init: str) -> float:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(128, 128))
        x = random(64, 128)
        before = module(x).detach()
        attach(module, {"rank": 16, "init": init})
        return float((module(x).detach() - before).norm())

    # The 16 largest of 128 directions of white noise hold about 2.4 times their share, 30 %: the
    # norm of the rest is sqrt(0.7) of the whole.
    assert error("loftq") < 0.9 * error("default")


def test_what_attach_cannot_do_is_refused() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(ConfigError, match="pissa needs a second one"):
        attach(module, {"init": "pissa"})
    with pytest.raises(ConfigError, match="no quantization error"):
        attach(module, {"init": "loftq"}, codebook=None)
    with pytest.raises(ConfigError, match="`attach` has the weights"):
        attach(module, {"init": "loftq", "init_weights": "x"})
    assert isinstance(module[0], torch.nn.Linear)

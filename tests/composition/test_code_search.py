"""Searching codes: against all combinations of a small layer, and for what rounding gives."""

import itertools

import pytest
import torch
from torch import Tensor

from halfbyte.composition.code_search import (
    Grid,
    damp_,
    descend,
    feed_back,
    make_feedback,
    make_grid,
    output_error,
    search,
)
from halfbyte.formats.codebooks import FP4, NF4, Codebook
from halfbyte.formats.quantized_tensor import quantize


def moments(num_inputs: int, num_tokens: int = 300) -> Tensor:
    """Of inputs that are correlated, as those of real layers are."""
    generator = torch.Generator().manual_seed(num_inputs)
    mixing = torch.randn(num_inputs, num_inputs, generator=generator)
    x_TI = torch.randn(num_tokens, num_inputs, generator=generator) @ mixing
    return damp_(x_TI.T @ x_TI / num_tokens)


def layer(
    num_inputs: int, num_outputs: int, codebook: Codebook = NF4
) -> tuple[Tensor, Grid, Tensor]:
    """Weights `[I, O]`, their grid, and the nearest values on it; blocks cross rows."""
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(num_outputs, num_inputs, generator=generator)
    quantized = quantize(weight_OI, codebook, double_quant=False)
    scales = quantized.scales.repeat_interleave(64)[: weight_OI.numel()].view(weight_OI.shape)
    grid = make_grid(codebook, scales.T.contiguous())
    return weight_OI.T.contiguous(), grid, quantized.dequantize().T.contiguous()


def total(values_IO: Tensor, weight_IO: Tensor, hessian_II: Tensor) -> float:
    return float(output_error(values_IO - weight_IO, hessian_II).double().sum())


@pytest.mark.parametrize("codebook", [NF4, FP4], ids=lambda book: book.name)
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(1, 3), (50, 20), (200, 33)])
def test_each_step_brings_the_outputs_closer(
    codebook: Codebook, num_inputs: int, num_outputs: int
) -> None:
    weight, grid, nearest = layer(num_inputs, num_outputs, codebook)
    hessian = moments(num_inputs)
    fed_back = feed_back(weight, grid, make_feedback(hessian))
    descended = descend(weight, grid, hessian, fed_back)
    errors = [total(values, weight, hessian) for values in (nearest, fed_back, descended)]
    if num_inputs == 1:  # nothing can make up for anything
        assert errors[0] == pytest.approx(errors[1])
        return
    # Correlated inputs leave room for a third at least; by how much is not a law.
    assert errors[1] < 0.67 * errors[0]
    assert errors[2] < errors[1]


def test_values_are_on_the_grid_and_codes_stand_for_them() -> None:
    for codebook in (NF4, FP4):
        weight, grid, start = layer(70, 12, codebook)
        hessian = moments(70)
        values = search(weight, grid, hessian, make_feedback(hessian), start)
        decoded = codebook.table()[grid.encode(values).long()] * grid.scales_IO
        # Sums of changes have their roundings: two a sweep, of values below 4.
        torch.testing.assert_close(values, decoded, rtol=0, atol=4 * 2**-24 * 8)


def test_no_output_is_worse_than_the_start() -> None:
    weight, grid, nearest = layer(64, 40)
    hessian = moments(64)
    # On the grid but for a hair: the nearest values can hardly be beaten, feedback alone may lose.
    close = nearest + 1e-4 * weight
    found = search(close, grid, hessian, make_feedback(hessian), nearest)
    before = output_error(nearest - close, hessian)
    after = output_error(found - close, hessian)
    assert (after <= before * (1 + 1e-4)).all()


def test_the_best_of_all_combinations_is_nearly_found() -> None:
    weight, grid, nearest = layer(5, 6)
    hessian = moments(5)
    found = search(weight, grid, hessian, make_feedback(hessian), nearest)
    for column in range(6):
        options = grid.table * grid.scales_IO[:, column, None]
        every = torch.tensor(list(itertools.product(range(16), repeat=3)))
        # The two inputs with the largest scales fixed at what was found: 16^3 is enough to try.
        tried = found[:, column].repeat(len(every), 1)
        for place in range(3):
            tried[:, place] = options[place][every[:, place]]
        best = output_error((tried - weight[:, column]).T, hessian).min()
        mine = output_error((found - weight)[:, column, None], hessian)[0]
        rounded = output_error((nearest - weight)[:, column, None], hessian)[0]
        assert mine <= rounded * (1 + 1e-5)
        assert mine <= 2.5 * best + 1e-6


def test_blocks_of_zeros_stay_zeros() -> None:
    weight = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    scales = torch.ones(8, 3)
    scales[2:5] = 0
    grid = make_grid(NF4, scales)
    hessian = moments(8)
    values = search(weight, grid, hessian, make_feedback(hessian), torch.zeros(8, 3))
    assert (values[2:5] == 0).all()
    assert values.isfinite().all()


def test_inputs_that_never_occur_leave_the_search_defined() -> None:
    weight, grid, nearest = layer(6, 4)
    hessian = damp_(torch.zeros(6, 6))
    found = search(weight, grid, hessian, make_feedback(hessian), nearest)
    torch.testing.assert_close(found, nearest)

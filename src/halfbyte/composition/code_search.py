"""4-bit codes that keep the outputs of a linear layer, where rounding would keep its weights.

With scales fixed, the codes of one output are a point on a grid, and the mean squared change of
that output is a quadratic form of what the codes change: `(q - w) H (q - w)`, H the mean of `x xᵀ`
over inputs. Nearest codes ignore H. Two searches do not, all outputs at once:

- error feedback goes through the inputs once, rounds each weight, and lets the weights that are
  still to come make up for its error;
- descent goes through the inputs again and again, and takes for each the code that is best while
  all others stay.

Dimension key:
    I  input features        O  outputs that share the inputs
    B  inputs of a block     T  tokens, packed

Source:
    GPTQ, arXiv:2210.17323 (error feedback in the order of a Cholesky factor, lazily by blocks);
    QuantEase, arXiv:2309.01885 (coordinate descent).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.formats.codebooks import Codebook

FEEDBACK_BLOCK, DESCENT_BLOCK = 128, 64
DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it: inputs that calibration hardly shows."""


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """What the weights of a layer can become.

    Attributes:
        table: float32 `[16]`, sorted.
        codes: uint8 `[16]`; the code of each value.
        midpoints: float32 `[15]`.
        scales_IO: float32; of each weight.
        inverse_IO: One over the scales; 0 where they are.
    """

    table: Tensor
    codes: Tensor
    midpoints: Tensor
    scales_IO: Tensor
    inverse_IO: Tensor

    def nearest(self, row: int, values_O: Tensor) -> Tensor:
        """The representable value next to each of one input's weights, `[O]`."""
        index = torch.bucketize(values_O * self.inverse_IO[row], self.midpoints)
        return self.table[index].mul_(self.scales_IO[row])

    def encode(self, values_IO: Tensor) -> Tensor:
        """The codes of representable values, uint8 `[I, O]`."""
        codes = torch.empty(values_IO.shape, dtype=torch.uint8)
        for row, values in enumerate(values_IO):
            index = torch.bucketize(values * self.inverse_IO[row], self.midpoints)
            codes[row] = self.codes[index]
        return codes

    def permuted(self, order: Tensor) -> "Grid":
        """The same for inputs in another order."""
        return Grid(
            self.table,
            self.codes,
            self.midpoints,
            self.scales_IO[order],
            self.inverse_IO[order],
        )


def make_grid(codebook: Codebook, scales_IO: Tensor) -> Grid:
    """The grid of a codebook with a scale for each weight."""
    table = codebook.table()
    order = torch.argsort(table, stable=True)
    values = table[order]
    inverse = torch.where(scales_IO == 0, 0.0, 1 / scales_IO)
    midpoints = (values[:-1] + values[1:]) / 2
    return Grid(values, order.to(torch.uint8), midpoints, scales_IO, inverse)


def damped(hessian_II: Tensor) -> Tensor:
    """H with `DAMPING`, positive definite; inputs that are always 0 count as others hardly do."""
    diagonal = hessian_II.diagonal()
    extra = DAMPING * float(diagonal.mean()) or 1.0
    result = hessian_II.clone()
    result.diagonal().add_(extra)
    return result


def output_error(error_IO: Tensor, hessian_II: Tensor) -> Tensor:
    """Mean squared change of each output when the weights change by `error`, `[O]`."""
    return (error_IO * (hessian_II @ error_IO)).sum(dim=0).clamp_(min=0)


def search(
    weight_IO: Tensor,
    grid: Grid,
    hessian_II: Tensor,
    *,
    start_IO: Tensor | None = None,
    sweeps: int = 3,
) -> Tensor:
    """The representable values that change the outputs least, as far as the searches find them.

    Args:
        weight_IO: float32; what the layer should compute with.
        grid: What it can.
        hessian_II: float32, positive definite; see `damped`.
        start_IO: Representable values to start the descent from where they are better than what
            error feedback finds, output by output: the base's own.
        sweeps: Of the descent.

    Returns:
        float32 `[I, O]`; no output is worse, under `hessian_II`, than from `start_IO`.
    """
    found_IO = feed_back(weight_IO, grid, hessian_II)
    if start_IO is not None:
        better_O = output_error(start_IO - weight_IO, hessian_II) < output_error(
            found_IO - weight_IO, hessian_II
        )
        found_IO = torch.where(better_O, start_IO, found_IO)
    return descend(weight_IO, grid, hessian_II, found_IO, sweeps=sweeps)


def feed_back(weight_IO: Tensor, grid: Grid, hessian_II: Tensor) -> Tensor:
    """Round the weights one input after the other; those to come make up for each error.

    Inputs go in the order of their mean square, the largest first, while most can still follow.
    """
    order = torch.argsort(hessian_II.diagonal(), descending=True, stable=True)
    upper_II = _feedback_factors(hessian_II[order][:, order])
    left_IO, ordered = weight_IO[order], grid.permuted(order)
    found_IO = torch.empty_like(weight_IO)
    for begin, end in _blocks(len(order), FEEDBACK_BLOCK):
        errors_BO = torch.empty_like(left_IO[begin:end])
        for row in range(begin, end):
            value_O = ordered.nearest(row, left_IO[row])
            found_IO[order[row]] = value_O
            error_O = errors_BO[row - begin]
            torch.sub(left_IO[row], value_O, out=error_O).div_(upper_II[row, row])
            left_IO[row + 1 : end].addr_(upper_II[row, row + 1 : end], error_O, alpha=-1)
        left_IO[end:].addmm_(upper_II[begin:end, end:].T, errors_BO, alpha=-1)
    return found_IO


def descend(
    weight_IO: Tensor, grid: Grid, hessian_II: Tensor, start_IO: Tensor, *, sweeps: int
) -> Tensor:
    """Change one code at a time to the best one, all others fixed; never raises an output's error.

    With error d and gradient g = H d, the best value of input i is the one nearest to
    `w_i + d_i - g_i / H_ii`.
    """
    values_IO = start_IO.clone()
    error_IO = values_IO - weight_IO
    gradient_IO = hessian_II @ error_IO
    diagonal_I = hessian_II.diagonal()
    for _ in range(sweeps):
        num_changed = 0
        for begin, end in _blocks(len(diagonal_I), DESCENT_BLOCK):
            changes_BO = torch.empty_like(values_IO[begin:end])
            for row in range(begin, end):
                change_O = changes_BO[row - begin]
                wanted_O = values_IO[row] - gradient_IO[row] / diagonal_I[row]
                torch.sub(grid.nearest(row, wanted_O), values_IO[row], out=change_O)
                values_IO[row] += change_O
                gradient_IO[begin:end].addr_(hessian_II[begin:end, row], change_O)
            num_changed += int(changes_BO.count_nonzero())
            gradient_IO[:begin].addmm_(hessian_II[:begin, begin:end], changes_BO)
            gradient_IO[end:].addmm_(hessian_II[end:, begin:end], changes_BO)
        if not num_changed:
            break
    return values_IO


def _feedback_factors(hessian_II: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of H, whose row i spreads the error of input i."""
    lower_II = torch.linalg.cholesky(hessian_II)
    inverse_II = torch.cholesky_inverse(lower_II)
    upper_II: Tensor = torch.linalg.cholesky(inverse_II, upper=True)
    return upper_II


def _blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + size, count)) for begin in range(0, count, size))

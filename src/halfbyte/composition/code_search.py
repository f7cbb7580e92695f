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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.formats.codebooks import Codebook

FEEDBACK_BLOCK, DESCENT_BLOCK = 128, 64
SWEEPS = 2
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
    """

    table: Tensor
    codes: Tensor
    midpoints: Tensor
    scales_IO: Tensor

    def nearest(self, row: int, values_O: Tensor) -> Tensor:
        """The representable value next to each of one input's weights, `[O]`."""
        return self.table[self._index(row, values_O)].mul_(self.scales_IO[row])

    def encode(self, values_IO: Tensor) -> Tensor:
        """The codes of representable values, uint8 `[I, O]`."""
        codes = torch.empty(values_IO.shape, dtype=torch.uint8)
        for row, values in enumerate(values_IO):
            codes[row] = self.codes[self._index(row, values)]
        return codes

    def _index(self, row: int, values_O: Tensor) -> Tensor:
        # A scale of 0 makes infinities, or NaN, which `bucketize` puts behind the last value.
        relative_O = values_O / self.scales_IO[row]
        return torch.bucketize(relative_O.nan_to_num_(), self.midpoints)

    def select(self, inputs: Tensor | slice, outputs: slice) -> "Grid":
        """The same for some inputs, in any order, and some outputs."""
        return replace(self, scales_IO=self.scales_IO[inputs, outputs])


def make_grid(codebook: Codebook, scales_IO: Tensor) -> Grid:
    """The grid of a codebook with a scale for each weight."""
    table = codebook.table()
    order = torch.argsort(table, stable=True)
    values = table[order]
    midpoints = (values[:-1] + values[1:]) / 2
    return Grid(values, order.to(torch.uint8), midpoints, scales_IO)


def damp_(hessian_II: Tensor) -> Tensor:
    """Add `DAMPING` to H, in place: it becomes positive definite."""
    diagonal = hessian_II.diagonal()
    diagonal.add_(DAMPING * float(diagonal.mean()) or 1.0)
    return hessian_II


def output_error(error_IO: Tensor, hessian_II: Tensor) -> Tensor:
    """Mean squared change of each output when the weights change by `error`, `[O]`."""
    return (error_IO * (hessian_II @ error_IO)).sum(dim=0).clamp_(min=0)


@dataclass(frozen=True, slots=True, eq=False)
class Feedback:
    """How the error of one input's weights spreads over those still to come.

    Attributes:
        order: int64 `[I]`; inputs by their mean square, the largest first, while most can follow.
        upper_II: The upper Cholesky factor of the inverse of H in that order.
    """

    order: Tensor
    upper_II: Tensor


def make_feedback(hessian_II: Tensor) -> Feedback:
    """The factors for a positive definite H; they serve all searches with it."""
    order = torch.argsort(hessian_II.diagonal(), descending=True, stable=True)
    factor_II = torch.linalg.cholesky(hessian_II[order][:, order])
    torch.cholesky_inverse(factor_II, out=factor_II)
    return Feedback(order, torch.linalg.cholesky(factor_II, upper=True))


def search(
    weight_IO: Tensor, grid: Grid, hessian_II: Tensor, feedback: Feedback, start_IO: Tensor
) -> Tensor:
    """The representable values that change the outputs least, as far as the searches find them.

    Args:
        weight_IO: float32; what the layer should compute with.
        grid: What it can.
        hessian_II: float32, positive definite; see `damp_`.
        feedback: Of `hessian_II`.
        start_IO: Representable values to start the descent from where they are better than what
            error feedback finds, output by output: the base's own.

    Returns:
        float32 `[I, O]`; no output is worse, under `hessian_II`, than from `start_IO`.
    """
    found_IO = feed_back(weight_IO, grid, feedback)
    better_O = output_error(start_IO - weight_IO, hessian_II) < output_error(
        found_IO - weight_IO, hessian_II
    )
    found_IO = torch.where(better_O, start_IO, found_IO)
    return descend(weight_IO, grid, hessian_II, found_IO)


def feed_back(weight_IO: Tensor, grid: Grid, feedback: Feedback) -> Tensor:
    """Round the weights one input after the other; those to come make up for each error."""
    order, upper_II = feedback.order, feedback.upper_II
    left_IO, ordered = weight_IO[order], grid.select(order, slice(None))
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
    weight_IO: Tensor, grid: Grid, hessian_II: Tensor, start_IO: Tensor, *, sweeps: int = SWEEPS
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


def _blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + size, count)) for begin in range(0, count, size))

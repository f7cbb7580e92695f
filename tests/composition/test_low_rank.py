"""Approximations of low rank that are judged by outputs, against the optimum from float64."""

import torch

from halfbyte.composition.code_search import make_feedback
from halfbyte.composition.low_rank import weighted_low_rank


def test_outputs_are_as_close_as_the_rank_allows() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    matrix_OI = torch.randn(40, 24, generator=generator)
    hessian = x_TI.T @ x_TI / 400
    b_OR, a_RI = weighted_low_rank(matrix_OI, make_feedback(hessian), 5)
    assert (b_OR.shape, a_RI.shape) == ((40, 5), (5, 24))
    left = (matrix_OI - b_OR @ a_RI).double() @ x_TI.double().T
    # Eckart-Young: what the best matrix of that rank leaves of the outputs over these inputs.
    outputs = matrix_OI.double() @ x_TI.double().T
    optimum = torch.linalg.svdvals(outputs)[5:].square().sum().sqrt()
    # float32 factors, and triangular solves with a condition number of about 1e3.
    torch.testing.assert_close(left.norm(), optimum, rtol=1e-3, atol=0)
    # Without the weights the outputs fare worse.
    u, s, v = torch.linalg.svd(matrix_OI)
    plain = (matrix_OI - (u[:, :5] * s[:5]) @ v[:5]).double() @ x_TI.double().T
    assert plain.norm() > 1.1 * optimum


def test_a_rank_larger_than_the_layer_is_the_layer() -> None:
    matrix_OI = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    b_OR, a_RI = weighted_low_rank(matrix_OI, make_feedback(torch.eye(7)), 9)
    assert b_OR.shape == (3, 3)
    torch.testing.assert_close(b_OR @ a_RI, matrix_OI, rtol=1e-5, atol=1e-5)

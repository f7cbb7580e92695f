"""The best approximation of low rank to a linear layer's change, judged by its outputs.

Dimension key:
    I  input features        O  output features        R  rank
"""

import torch
from torch import Tensor

from halfbyte.composition.code_search import Feedback
from halfbyte.composition.compress import Limit, compress_dense


def weighted_low_rank(matrix_OI: Tensor, feedback: Feedback, rank: int) -> tuple[Tensor, Tensor]:
    """Factors whose product changes the outputs as `matrix` does, as nearly as the rank allows.

    For any L with H = L Lᵀ the mean squared difference of the outputs is `|(M - B A) L|²`; so the
    singular vectors of `M L` decide, and A is brought back through L. The factor of the inverse
    that error feedback needs, U with H⁻¹ = Uᵀ U, gives L = U⁻¹ without another matrix of its size.

    Args:
        matrix_OI: float32.
        feedback: Of H, the mean of `x xᵀ` over inputs.
        rank: R; at most the smaller side is used.

    Returns:
        B `[O, R]` and A `[R, I]`, float32.
    """
    order, upper_II = feedback.order, feedback.upper_II
    weighted_OI = torch.linalg.solve_triangular(
        upper_II, matrix_OI[:, order], upper=True, left=False
    )
    found = compress_dense(weighted_OI, Limit(rank=min(rank, *matrix_OI.shape)))
    (term,) = found.update.terms
    a_RI = torch.empty_like(term.a_RI)
    a_RI[:, order] = term.a_RI @ upper_II
    return term.b_OR * term.weight, a_RI

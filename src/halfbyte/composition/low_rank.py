"""The best approximation of low rank to a linear layer's change, judged by its outputs.

Dimension key:
    I  input features        O  output features        R  rank
"""

import torch
from torch import Tensor

from halfbyte.composition.compress import Limit, compress_dense


def weighted_low_rank(matrix_OI: Tensor, lower_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors whose product changes the outputs as `matrix` does, as nearly as the rank allows.

    With H = L Lᵀ the mean of `x xᵀ` over inputs, the mean squared difference of the outputs is
    `|(M - B A) L|²`; so the singular vectors of `M L` decide, and A is brought back through L.

    Args:
        matrix_OI: float32.
        lower_II: L, the lower Cholesky factor of H.
        rank: R; at most the smaller side is used.

    Returns:
        B `[O, R]` and A `[R, I]`, float32.
    """
    found = compress_dense(matrix_OI @ lower_II, Limit(rank=min(rank, *matrix_OI.shape)))
    (term,) = found.update.terms
    a_RI = torch.linalg.solve_triangular(lower_II, term.a_RI, upper=False, left=False)
    return term.b_OR * term.weight, a_RI

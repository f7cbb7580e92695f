"""The nearest update of a lower rank, and how much of the energy it keeps.

Energy is the squared Frobenius norm, the sum of the squared singular values. By Eckart and Young
no update of rank k is nearer than the first k singular triplets.

A factored update goes through QR of both stacked factors and the SVD of a core as small as its
rank. A dense one, which `ties` and `dare` make, is decomposed as a whole where it is small or the
rank is not known beforehand, and else by a randomized range finder.

Dimension key:
    I  input features         K  rank before
    O  output features        R  rank after, or of the sketch
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.composition.factored import Factored, Term

EXACT_UP_TO = 512
"""A dense matrix with a side this short is decomposed as a whole."""
OVERSAMPLING = 16
"""Columns of the sketch beyond the rank."""
POWER_ITERATIONS = 4
"""What TIES leaves has slowly falling singular values; each iteration sharpens the sketch."""
_CHUNK_ROWS = 512


@dataclass(frozen=True, slots=True)
class Limit:
    """How far to compress; exactly one attribute is given.

    Attributes:
        rank: At most this.
        fidelity: The smallest rank that keeps this part of the energy.
    """

    rank: int | None = None
    fidelity: float | None = None

    def choose(self, sigma_K: Tensor) -> int:
        """The rank, at least 1, for singular values in falling order."""
        if self.rank is not None:
            return min(self.rank, len(sigma_K))
        assert self.fidelity is not None  # noqa: S101  (one of the two is given)
        # Summed from the smallest: what is dropped may be many orders below the total.
        tail_K = sigma_K.square().flip(0).cumsum(0).flip(0)
        allowed = (1 - self.fidelity) * tail_K[0]
        # Below the rounding of the decomposition there is nothing but noise.
        noise = (torch.finfo(sigma_K.dtype).eps * sigma_K[0]).square() * len(sigma_K)
        return max(1, int((tail_K > torch.maximum(allowed, noise)).sum()))


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """An update of lower rank.

    Attributes:
        update: One term.
        energy: Of what was compressed.
        dropped: Energy of the difference.
    """

    update: Factored
    energy: float
    dropped: float


def compress(update: Factored, limit: Limit) -> Compressed:
    """Compress an update that has at least one term; memory stays proportional to its rank.

    Error bound:
        All steps are in float64, and the factors are rounded to float32 at the end: the distance
        to the update is the optimum within a relative 1e-6.
    """
    b_OK, a_KI = update.stack()
    left_OK, upper_left = torch.linalg.qr(b_OK)
    right_IK, upper_right = torch.linalg.qr(a_KI.T)
    u_KK, sigma_K, vh_KK = torch.linalg.svd(upper_left @ upper_right.T, full_matrices=False)
    rank = limit.choose(sigma_K)
    term = _balanced(left_OK @ u_KK[:, :rank], sigma_K[:rank], vh_KK[:rank] @ right_IK.T)
    squares = sigma_K.square()
    return Compressed(Factored((term,)), squares.sum().item(), squares[rank:].sum().item())


def compress_dense(delta_OI: Tensor, limit: Limit) -> Compressed:
    """Compress a matrix; the energy that is dropped is measured on the result.

    Args:
        delta_OI: float32.
        limit: A fidelity needs all singular values, so it takes the whole decomposition.
    """
    shorter = min(delta_OI.shape)
    width = OVERSAMPLING + (limit.rank or shorter)
    if shorter <= EXACT_UP_TO or width >= shorter:
        # Small ones in float64, which costs little there.
        matrix_OI = delta_OI.double() if shorter <= EXACT_UP_TO else delta_OI
        u_OR, sigma_R, vh_RI = torch.linalg.svd(matrix_OI, full_matrices=False)
    else:
        basis_OR = _range_of(delta_OI, width)
        u_RR, sigma_R, vh_RI = torch.linalg.svd(basis_OR.T @ delta_OI, full_matrices=False)
        u_OR = basis_OR @ u_RR
    rank = limit.choose(sigma_R)
    term = _balanced(u_OR[:, :rank], sigma_R[:rank], vh_RI[:rank])
    energy, dropped = 0.0, 0.0
    for begin in range(0, delta_OI.shape[0], _CHUNK_ROWS):
        rows_CI = delta_OI[begin : begin + _CHUNK_ROWS]
        rest_CI = rows_CI - term.b_OR[begin : begin + _CHUNK_ROWS] @ term.a_RI
        energy += rows_CI.double().square().sum().item()
        dropped += rest_CI.double().square().sum().item()
    return Compressed(Factored((term,)), energy, dropped)


def _range_of(delta_OI: Tensor, width: int) -> Tensor:
    """An orthonormal basis `[O, R]` of nearly all that the largest singular vectors span.

    Source:
        Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4.
    """
    generator = torch.Generator().manual_seed(0)
    sketch_IR = torch.randn(delta_OI.shape[1], width, generator=generator)
    basis_OR: Tensor = torch.linalg.qr(delta_OI @ sketch_IR).Q
    for _ in range(POWER_ITERATIONS):
        sketch_IR = torch.linalg.qr(delta_OI.T @ basis_OR).Q
        basis_OR = torch.linalg.qr(delta_OI @ sketch_IR).Q
    return basis_OR


def _balanced(left_OR: Tensor, sigma_R: Tensor, right_RI: Tensor) -> Term:
    """Both factors get the root of the singular values, so that neither is much larger."""
    root_R = sigma_R.sqrt()
    return Term(1.0, (left_OR * root_R).float(), (root_R[:, None] * right_RI).float())

"""Factors that begin as the best low-rank approximation of a matrix.

PiSSA (arXiv:2404.02948) takes them from the weight itself, LoftQ (arXiv:2310.08659) from what
quantizing took away from it.

Dimension key: R rank, I input features, O output features.
"""

import zlib

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.adapters.spec import LoraShape
from halfbyte.layers.lora import fold_seed

POWER_ITERATIONS = 8
OVERSAMPLING = 16


def principal_factors(
    matrix_OI: Tensor, shape: LoraShape, *, path: str, seed: int
) -> tuple[Tensor, Tensor]:
    """A `[R, I]` and B `[O, R]` with `scaling * B A` close to the matrix, float32.

    The singular values are divided evenly between the two. They come from a randomized subspace
    iteration, whose cost grows with the rank and not with the smaller side of the matrix; what it
    finds of white noise, the worst case, holds 99 % of the optimum's energy or more.

    Args:
        matrix_OI: Any floating dtype.
        shape: Rank and scaling.
        path: Of the layer; with `seed` it fixes the random start.
        seed: Of the run.

    Source:
        Halko, Martinsson and Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_seed(seed, zlib.crc32(path.encode())))
        size = min(shape.rank + OVERSAMPLING, *matrix_OI.shape)
        u, s, v = torch.svd_lowrank(matrix_OI.float(), q=size, niter=POWER_ITERATIONS)
    u_OR, s_R, v_IR = (found[..., : shape.rank] for found in (u, s, v))
    root_R = (s_R / shape.scaling).sqrt()
    # A rank above the smaller side of the matrix is filled up with zeros.
    missing = shape.rank - len(root_R)
    a_RI = functional.pad(root_R[:, None] * v_IR.T, (0, 0, 0, missing))
    b_OR = functional.pad(u_OR * root_R, (0, missing))
    return a_RI.contiguous(), b_OR.contiguous()

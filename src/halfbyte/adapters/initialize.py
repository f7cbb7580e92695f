"""How the factors of a new adapter start.

Every layer draws from a generator of its own, seeded by the run's seed and the layer's path: what
one layer starts with does not depend on which others are adapted.
"""

import math
import zlib

import torch
from torch import Tensor

from halfbyte.adapters.principal import principal_factors
from halfbyte.adapters.spec import Initialization, LoraShape
from halfbyte.layers.lora import LoraFactors, fold_seed


def new_factors(
    shape: LoraShape,
    features: tuple[int, int],
    *,
    path: str,
    seed: int,
    init: Initialization = "default",
    dropout: float = 0.0,
    matrix_OI: Tensor | None = None,
) -> LoraFactors:
    """Trainable factors.

    `default` draws A uniformly from ±1 / sqrt(I), as PEFT does; `gaussian` from a normal
    distribution with standard deviation 1 / R. B is zero in both. With a matrix, `scaling * B A`
    is its best approximation instead.

    Args:
        shape: Rank and scaling.
        features: Output and input features of the linear layer, (O, I).
        path: Of the linear layer.
        seed: Of the run.
        init: Distribution of A.
        dropout: Of the adapter's input in training.
        matrix_OI: For `pissa` and `loftq`: what to approximate.
    """
    if matrix_OI is not None:
        a_RI, b_OR = principal_factors(matrix_OI, shape, path=path, seed=seed)
        return LoraFactors(
            a_RI.requires_grad_(), b_OR.requires_grad_(), shape.scaling, dropout=dropout
        )
    num_outputs, num_inputs = features
    generator = torch.Generator().manual_seed(fold_seed(seed, zlib.crc32(path.encode())))
    a_RI = torch.empty(shape.rank, num_inputs)
    if init == "gaussian":
        a_RI.normal_(0.0, 1 / shape.rank, generator=generator)
    else:
        bound = 1 / math.sqrt(num_inputs)
        a_RI.uniform_(-bound, bound, generator=generator)
    b_OR = torch.zeros(num_outputs, shape.rank)
    return LoraFactors(a_RI.requires_grad_(), b_OR.requires_grad_(), shape.scaling, dropout=dropout)

"""TIES and DARE on the updates themselves, one layer at a time.

Both look at single elements of B A, so they need the product. Factors stay factors until their turn
comes: at any time there are four matrices of the layer's shape, however many parts there are.

Dimension key: O output features, I input features.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.composition.factored import Factored
from halfbyte.layers.lora import dropout_mask, fold_seed

Update = Factored | Tensor
"""One layer's update: in factored form, or float32 `[O, I]`."""

_MASK_LEVELS = 2**16
"""Steps in which `dropout_mask` resolves a probability."""


def ties(parts: Sequence[Update], density: float) -> Tensor:
    """Trim, elect a sign, and average what agrees with it, element by element.

    Semantics:
        trimmed_i = delta_i where |delta_i| is among its largest int(density * O * I), else 0
        sign      = 1 where sum_i trimmed_i >= 0, else -1
        result    = mean of the trimmed_i that have this sign; 0 where none has

    Args:
        parts: At least one, none zero.
        density: Part of the elements of each that is kept.

    Source:
        TIES-Merging, arXiv:2306.01708, with the sums of PEFT's `ties`; each layer is trimmed by
        itself.
    """
    thresholds = []
    total_OI: Tensor | None = None
    for part in parts:
        delta_OI = to_dense(part)
        thresholds.append(_threshold(delta_OI, density))
        trimmed_OI = delta_OI.masked_fill(delta_OI.abs() < thresholds[-1], 0)
        total_OI = trimmed_OI if total_OI is None else total_OI.add_(trimmed_OI)
    assert total_OI is not None  # noqa: S101  (there is a part)
    positive_OI = total_OI >= 0
    merged_OI = total_OI.zero_()
    count_OI = torch.zeros_like(positive_OI, dtype=torch.int16)
    for part, threshold in zip(parts, thresholds, strict=True):
        delta_OI = to_dense(part)
        keep_OI = (delta_OI.abs() >= threshold) & (delta_OI != 0)
        keep_OI &= (delta_OI > 0) == positive_OI
        merged_OI += delta_OI.masked_fill(~keep_OI, 0)
        count_OI += keep_OI
    return merged_OI.div_(count_OI.clamp_(min=1))


def dare(parts: Sequence[tuple[int, Update]], drop: float, seed: int, path: str) -> Tensor:
    """Drop elements at random and rescale the rest, so that every expectation stays; add up.

    What is dropped depends on the seed, the layer's path and the place of the part only.

    Args:
        parts: At least one, none zero, each with its place in the expression.
        drop: Probability, resolved to 1 / 65536.
        seed: Of the draws.
        path: Of the layer.

    Source:
        DARE, arXiv:2311.03099.
    """
    level = min(round(drop * _MASK_LEVELS), _MASK_LEVELS - 1)
    probability = level / _MASK_LEVELS
    total_OI: Tensor | None = None
    for place, part in parts:
        delta_OI = to_dense(part)
        key = fold_seed(zlib.crc32(path.encode()), place)
        keep_OI = dropout_mask(delta_OI.shape, probability, fold_seed(seed, key))
        pruned_OI = delta_OI.masked_fill(~keep_OI, 0).div_(1 - probability)
        total_OI = pruned_OI if total_OI is None else total_OI.add_(pruned_OI)
    assert total_OI is not None  # noqa: S101  (there is a part)
    return total_OI


def to_dense(update: Update) -> Tensor:
    """float32 `[O, I]`; not to be written to."""
    return update.dense() if isinstance(update, Factored) else update


def _threshold(delta_OI: Tensor, density: float) -> float:
    """The smallest magnitude that is kept."""
    count = delta_OI.numel()
    kept = max(1, int(density * count))
    # NumPy selects in place; torch.kthvalue would carry 8 bytes of index for every element.
    magnitudes = delta_OI.abs().view(-1).numpy()
    magnitudes.partition(count - kept)
    return float(magnitudes[count - kept])

"""Rotary position embeddings: frequencies by kind of scaling, and their application.

Dimension key:
    T  tokens, packed        H  heads
    D  features of a head    F  frequencies, D / 2
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.elementwise import rotate_ as kernel
from halfbyte.layers.autograd import Context, apply

Angles = tuple[Tensor, Tensor]
"""Cosine and sine of the angle of each token and frequency, float32 `[T, 1, F]` each."""


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """How positions become angles.

    Attributes:
        theta: Base of the wavelengths.
        kind: `default`, `linear`, `llama3` or `yarn`.
        factor: How much longer than in pretraining contexts may be; not for `default`.
        original_positions: Context length of pretraining, for `llama3` and `yarn`.
        low_freq_factor: `llama3`: wavelengths above `original_positions / low` are stretched.
        high_freq_factor: `llama3`: wavelengths below `original_positions / high` are kept.
        beta_fast: `yarn`: dimensions that turn more often than this are kept.
        beta_slow: `yarn`: dimensions that turn less often than this are stretched.
        attention_factor: Multiplies sine and cosine (`yarn`).
        truncate: `yarn`: round the range of dimensions outwards to whole numbers.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def inverse_frequencies(spec: RotarySpec, head_dim: int) -> Tensor:
    """Radians a position for each pair of features, float32 `[F]`.

    Source:
        RoFormer, arXiv:2104.09864; linear: arXiv:2306.15595; yarn: arXiv:2309.00071; llama3: the
        Llama 3.1 reference code.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / spec.theta**exponents
    if spec.kind == "linear":
        return plain / spec.factor
    if spec.kind == "llama3":
        return _llama3(plain, spec)
    if spec.kind == "yarn":
        return _yarn(plain, spec, head_dim)
    return plain


def _llama3(plain: Tensor, spec: RotarySpec) -> Tensor:
    turns = spec.original_positions * plain / (2 * math.pi)  # within the pretraining context
    kept = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * plain / spec.factor + kept * plain


def _yarn(plain: Tensor, spec: RotarySpec, head_dim: int) -> Tensor:
    def dimension_turning(turns: float) -> float:
        wavelength = spec.original_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(spec.theta))

    low, high = dimension_turning(spec.beta_fast), dimension_turning(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step rather than a division by zero
    steps = torch.arange(head_dim // 2, dtype=torch.float32)
    stretched = ((steps - low) / (high - low)).clamp(0, 1)
    return stretched * plain / spec.factor + (1 - stretched) * plain


def rotary_table(frequencies_F: Tensor, positions_T: Tensor, attention_factor: float) -> Angles:
    """What `rotate` takes."""
    angles = positions_T[:, None, None].float() * frequencies_F
    cosine, sine = angles.cos(), angles.sin()
    if attention_factor != 1.0:
        cosine, sine = cosine.mul_(attention_factor), sine.mul_(attention_factor)
    return cosine, sine


class _Rotate(torch.autograd.Function):
    """A rotation: its backward is the rotation the other way, so nothing else is saved."""

    @staticmethod
    def forward(ctx: Context, x_THD: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        out = x_THD.clone(memory_format=torch.contiguous_format)
        kernel(out, cosine, sine)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        out = grad.clone(memory_format=torch.contiguous_format)
        kernel(out, *ctx.saved_tensors, True)
        return out, None, None


def rotate(x_THD: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn feature pairs (i, i + F) of every head by the angle of its token, in float32.

    Args:
        x_THD: Queries or keys.
        cosine: float32 `[T, 1, F]`.
        sine: float32 `[T, 1, F]`.
    """
    return apply(_Rotate, x_THD, cosine, sine)


def rotate_(x_THD: Tensor, cosine: Tensor, sine: Tensor, *, inverse: bool = False) -> Tensor:
    """`rotate` in place, or the other way; not in place where gradients are recorded.

    Args:
        x_THD: The features of a head are consecutive.
        cosine: float32 `[T, 1, F]`.
        sine: float32 `[T, 1, F]`.
        inverse: Turn back.
    """
    if x_THD.requires_grad and torch.is_grad_enabled():
        return rotate(x_THD, cosine, -sine if inverse else sine)
    kernel(x_THD.detach(), cosine, sine, inverse)
    return x_THD

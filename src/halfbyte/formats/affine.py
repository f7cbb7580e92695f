"""INT4 with zero-points: the 16 levels of a block span exactly its minimum to its maximum.

Semantics, for a block with smallest value lo and largest value hi:
    scale      = hi / 15 - lo / 15           |lo| where hi == lo, so that constants survive
    zero_point = -lo / scale                 in units of codes, float32; 0 for a block of zeros
    code       = round(x / scale + zero_point) clamped to 0..15, halves to even
    value      = (code - zero_point) * scale
Kept in plain torch: it exists to be compared with, not to be trained on.
"""

import torch
from torch import Tensor


def encode_affine(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, uint8 `[ceil(N / 2)]`, scales and zero-points, float32 `[ceil(N / S)]`.

    Args:
        x: Any shape with N elements; float32, bfloat16 or float16, finite.
        block_size: Consecutive elements that share a scale and a zero-point, S.
    """
    flat = x.reshape(-1).float()
    padding = -flat.numel() % block_size
    if padding:  # repeat the last value: padding must not widen the range of its block
        flat = torch.cat((flat, flat[-1:].expand(padding)))
    blocks = flat.view(-1, block_size)
    low, high = blocks.amin(dim=1), blocks.amax(dim=1)
    scales = high / 15 - low / 15
    scales = torch.where(scales == 0, low.abs(), scales)
    divisors = torch.where(scales == 0, 1.0, scales)
    zero_points = -low / divisors
    levels = (blocks / divisors[:, None] + zero_points[:, None]).round_().clamp_(0, 15)
    codes = levels.to(torch.uint8).reshape(-1)[: x.numel()]
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[::2] << 4 | codes[1::2], scales, zero_points


def decode_affine(
    codes: Tensor, scales: Tensor, zero_points: Tensor, block_size: int, out: Tensor
) -> None:
    """Write the values into `out` (contiguous, N elements)."""
    nibbles = torch.stack((codes >> 4, codes & 15), dim=1).reshape(-1)[: out.numel()].float()
    padded = torch.nn.functional.pad(nibbles, (0, -nibbles.numel() % block_size))
    values = (padded.view(-1, block_size) - zero_points[:, None]) * scales[:, None]
    out.view(-1).copy_(values.reshape(-1)[: out.numel()])

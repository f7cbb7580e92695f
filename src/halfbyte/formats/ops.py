"""Block-wise quantization as operators: the schema, and the one body that defines the result.

The bodies here are plain torch and run on any device. They *are* the numeric law: every faster
kernel registers itself for its device under the same schema and must give the same bits. The
operators check nothing that a kernel does not check; `formats.tensor` is the safe entrance.

Semantics, for flat input x, sorted table t with order o (stable), midpoints m of t in float32:
    absmax[b] = max |x[i]| over the block b            (NaN if the block holds a NaN)
    y[i]      = x[i] * (1 / absmax[b])                 full block, absmax >= 2^-126
              = x[i] / absmax[b]                       short last block, or smaller absmax
    code[i]   = o[number of midpoints < y[i]]          so a tie takes the lower value
    out[i]    = round(table[code[i]] * absmax[b])      float32 product, then the output dtype
The two ways to divide are bitsandbytes' own, kept so that its bits come out; they differ by a
rounding, next to a midpoint only.
"""

import torch
from torch import Tensor

SMALLEST_NORMAL = 2.0**-126
EMPTY_TAIL_SCALE = 1e-38
"""What bitsandbytes stores as the scale of a short last block of zeros."""

_library = torch.library.Library("halfbyte", "DEF")
_library.define("quantize_4bit(Tensor x, Tensor table, int block_size) -> (Tensor, Tensor)")
_library.define(
    "dequantize_4bit(Tensor codes, Tensor table, Tensor scales, Tensor? nested_table, "
    "Tensor? nested_scales, float nested_offset, int nested_block_size, int block_size, "
    "Tensor(a!) out) -> ()"
)
_library.define("quantize_8bit(Tensor x, Tensor table, int block_size) -> (Tensor, Tensor)")
_library.define(
    "dequantize_8bit(Tensor codes, Tensor table, Tensor scales, int block_size, Tensor(a!) out)"
    " -> ()"
)


def quantize_4bit_reference(x: Tensor, table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x` by the law above.

    Args:
        x: Any shape with N elements; float32, bfloat16 or float16.
        table: float32 `[16]`.
        block_size: Consecutive elements that share a scale, S.

    Returns:
        Codes, uint8 `[ceil(N / 2)]`, the earlier element in the high nibble and an odd end
        padded with the code of 0.0; scales, float32 `[ceil(N / S)]`.
    """
    blocks, num_tail = _blocks(x, block_size)
    scales = blocks.abs().amax(dim=1)
    normal = scales >= SMALLEST_NORMAL
    if num_tail:
        if scales[-1] == 0:
            scales[-1] = EMPTY_TAIL_SCALE
        normal[-1] = False
    y = torch.where(
        normal[:, None],
        blocks * (1 / torch.where(normal, scales, 1.0))[:, None],
        blocks / torch.where(scales == 0, 1.0, scales)[:, None],
    )
    order = torch.argsort(table, stable=True)
    midpoints = (table[order][:-1] + table[order][1:]) / 2
    num_nibbles = x.numel() + x.numel() % 2  # blocks are even and zero-padded: y reaches this far
    codes = order[torch.bucketize(y.reshape(-1)[:num_nibbles], midpoints)].to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], scales


def dequantize_4bit_reference(
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    nested_table: Tensor | None,
    nested_scales: Tensor | None,
    nested_offset: float,
    nested_block_size: int,
    block_size: int,
    out: Tensor,
) -> None:
    """Write the values that codes and scales stand for into `out`.

    Args:
        codes: uint8 `[ceil(N / 2)]`, as `quantize_4bit` returns them.
        table: float32 `[16]`.
        scales: float32 `[ceil(N / S)]`; or, double-quantized, uint8 codes of that shape.
        nested_table: float32 `[256]` when double-quantized, else None.
        nested_scales: float32 `[ceil(len(scales) / nested_block_size)]`, else None.
        nested_offset: Added to every scale once its code is decoded; a float32 value.
        nested_block_size: Scales that share an entry of `nested_scales`.
        block_size: S.
        out: Contiguous, N elements; float32, bfloat16 or float16.
    """
    if nested_table is not None and nested_scales is not None:
        decoded = torch.empty(scales.shape, dtype=torch.float32, device=scales.device)
        dequantize_8bit_reference(scales, nested_table, nested_scales, nested_block_size, decoded)
        scales = decoded + nested_offset
    nibbles = torch.stack((codes >> 4, codes & 15), dim=1).reshape(-1)[: out.numel()]
    values, _ = _blocks(table[nibbles.long()], block_size)
    out.view(-1).copy_((values * scales[:, None]).reshape(-1)[: out.numel()])


def quantize_8bit_reference(x: Tensor, table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes of the nearest entries of a 256-entry table, and a scale a block.

    Nearest is meant exactly: x is compared with midpoint * absmax, and both the midpoint of two
    float32 entries (25 bits) and its product with a float32 (49 bits) are exact in float64.

    Args:
        x: Any shape with N elements; float32, bfloat16 or float16.
        table: float32 `[256]`, sorted.
        block_size: Consecutive elements that share a scale, S.

    Returns:
        Codes, uint8 `[N]`; scales (absmax), float32 `[ceil(N / S)]`.
    """
    blocks, _ = _blocks(x, block_size)
    scales = blocks.abs().amax(dim=1)
    midpoints = (table[:-1].double() + table[1:].double()) / 2
    codes = torch.searchsorted(midpoints * scales.double()[:, None], blocks.double())
    return codes.to(torch.uint8).reshape(-1)[: x.numel()], scales


def dequantize_8bit_reference(
    codes: Tensor, table: Tensor, scales: Tensor, block_size: int, out: Tensor
) -> None:
    """Write `table[code] * scale`, rounded once in float32, into `out` (contiguous, N elements)."""
    values, _ = _blocks(table[codes.long()], block_size)
    out.view(-1).copy_((values * scales[:, None]).reshape(-1)[: out.numel()])


def _blocks(x: Tensor, block_size: int) -> tuple[Tensor, int]:
    """`x` in float32 as `[ceil(N / S), S]`, zero-padded, and the length of a short last block."""
    flat = x.reshape(-1).float()
    num_tail = flat.numel() % block_size
    if num_tail:
        flat = torch.nn.functional.pad(flat, (0, block_size - num_tail))
    return flat.view(-1, block_size), num_tail


for _name, _body in {
    "quantize_4bit": quantize_4bit_reference,
    "dequantize_4bit": dequantize_4bit_reference,
    "quantize_8bit": quantize_8bit_reference,
    "dequantize_8bit": dequantize_8bit_reference,
}.items():
    _library.impl(_name, _body, "CompositeExplicitAutograd")


@torch.library.register_fake("halfbyte::quantize_4bit")
def _(x: Tensor, table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _empty_codes(x, (x.numel() + 1) // 2, block_size)


@torch.library.register_fake("halfbyte::quantize_8bit")
def _(x: Tensor, table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _empty_codes(x, x.numel(), block_size)


@torch.library.register_fake("halfbyte::dequantize_4bit")
@torch.library.register_fake("halfbyte::dequantize_8bit")
def _(*_args: object, **_kwargs: object) -> None:
    return None


def _empty_codes(x: Tensor, num_codes: int, block_size: int) -> tuple[Tensor, Tensor]:
    num_scales = -(-x.numel() // block_size)
    return (
        x.new_empty(num_codes, dtype=torch.uint8),
        x.new_empty(num_scales, dtype=torch.float32),
    )

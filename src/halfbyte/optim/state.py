"""How the state of one parameter is stored: in float32, or in 8 bits and a scale a block.

8-bit state is block-wise: 256 consecutive elements share a scale, their largest magnitude, and
each element is the code of the nearest entry of a dynamic map, unsigned for second moments.
A step decodes a block, updates it in float32 and encodes it again. Tensors under 4096 elements
stay in float32, as in bitsandbytes: they are small, and often the ones that need it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte import kernels as _kernels  # noqa: F401  (defines and registers the operators)
from halfbyte.formats.codebooks import DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP
from halfbyte.memory.layout import Field
from halfbyte.optim.rules import Moment

BLOCK_SIZE = 256
"""Elements that share a scale."""
MIN_8BIT_ELEMENTS = 4096
"""Smaller tensors keep float32 state."""

Update = Callable[[tuple[Tensor, ...]], None]


@dataclass(frozen=True, slots=True)
class Float32State:
    """Every moment in float32."""

    moments: tuple[Moment, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        """One a moment, with its name."""
        return tuple(Field(moment.name, torch.float32) for moment in self.moments)

    def apply(self, values: tuple[Tensor, ...], update: Update) -> None:
        """Let `update` change the values."""
        update(values)


@dataclass(frozen=True, slots=True)
class Blockwise8bitState:
    """Every moment as 8-bit codes and a scale a block."""

    moments: tuple[Moment, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        """Codes and scales of each moment in turn."""
        return tuple(
            field
            for moment in self.moments
            for field in (
                Field(f"{moment.name}_codes", torch.uint8),
                Field(f"{moment.name}_scales", torch.float32, BLOCK_SIZE),
            )
        )

    def apply(self, values: tuple[Tensor, ...], update: Update) -> None:
        """Decode, let `update` change the moments, encode.

        A block that was never written has a scale of zero and so decodes to zeros.
        """
        tables = [
            (DYNAMIC_MAP if moment.signed else UNSIGNED_DYNAMIC_MAP).table(values[0].device)
            for moment in self.moments
        ]
        pairs = list(zip(values[::2], values[1::2], tables, strict=True))
        decoded = []
        for codes, scales, table in pairs:
            moment = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
            torch.ops.halfbyte.dequantize_8bit(codes, table, scales, BLOCK_SIZE, moment)
            decoded.append(moment)
        update(tuple(decoded))
        for (codes, scales, table), moment in zip(pairs, decoded, strict=True):
            new_codes, new_scales = torch.ops.halfbyte.quantize_8bit(moment, table, BLOCK_SIZE)
            codes.copy_(new_codes)
            scales.copy_(new_scales)


StateFormat = Float32State | Blockwise8bitState


def state_format(moments: tuple[Moment, ...], *, bits: int, num_elements: int) -> StateFormat:
    """How to store the state of a parameter of that size when `bits` are asked for."""
    if bits == 8 and num_elements >= MIN_8BIT_ELEMENTS:  # noqa: PLR2004
        return Blockwise8bitState(moments)
    return Float32State(moments)

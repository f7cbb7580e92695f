"""How the state of one parameter is stored: in float32, or in 8 bits and a scale a block.

8-bit state is block-wise: 256 consecutive elements share a scale, their largest magnitude, and
each element is the code of the nearest entry of a dynamic map, unsigned for second moments.
A step decodes a block, updates it in float32 and encodes it again. Tensors under 4096 elements
stay in float32, as in bitsandbytes: they are small, and often the ones that need it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.memory.layout import Field
from halfbyte.optim.rules import BLOCK_SIZE, Rule, Scalars

MIN_8BIT_ELEMENTS = 4096
"""Smaller tensors keep float32 state."""


@dataclass(frozen=True, slots=True)
class Float32State:
    """Every moment of a rule in float32."""

    rule: Rule

    @property
    def fields(self) -> tuple[Field, ...]:
        """One a moment, with its name."""
        return tuple(Field(moment.name, torch.float32) for moment in self.rule.moments)

    def update(
        self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], scalars: Scalars
    ) -> None:
        """Change a parameter and its state in place; all flat."""
        self.rule.update(param, grad, state, scalars)


@dataclass(frozen=True, slots=True)
class Blockwise8bitState:
    """Every moment of a rule as 8-bit codes and a scale a block."""

    rule: Rule

    @property
    def fields(self) -> tuple[Field, ...]:
        """Codes and scales of each moment in turn."""
        return tuple(
            field
            for moment in self.rule.moments
            for field in (
                Field(f"{moment.name}_codes", torch.uint8),
                Field(f"{moment.name}_scales", torch.float32, BLOCK_SIZE),
            )
        )

    def update(
        self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], scalars: Scalars
    ) -> None:
        """Change a parameter and its state in place; all flat, from a multiple of a block on."""
        self.rule.update_8bit(param, grad, state, scalars)


StateFormat = Float32State | Blockwise8bitState


def state_format(rule: Rule, *, bits: int, num_elements: int) -> StateFormat:
    """How to store the state of a parameter of that size when `bits` are asked for."""
    if bits == 8 and num_elements >= MIN_8BIT_ELEMENTS:  # noqa: PLR2004
        return Blockwise8bitState(rule)
    return Float32State(rule)

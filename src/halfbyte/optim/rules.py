"""How one step changes a parameter: AdamW, Lion, and SGD with momentum.

A rule is arithmetic on flat float32 tensors, element by element. It knows neither where state is
kept nor in how many bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.formats.codebooks import DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP
from halfbyte.kernels import adamw as _adamw  # noqa: F401  (defines the operator)

Scalars = tuple[float, ...]

BLOCK_SIZE = 256
"""Elements of 8-bit state that share a scale."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One tensor of state: as large as the parameter, zero at first."""

    name: str
    signed: bool = True

    def table(self, device: torch.device) -> Tensor:
        """What its 8-bit codes stand for, float32 `[256]`."""
        return (DYNAMIC_MAP if self.signed else UNSIGNED_DYNAMIC_MAP).table(device)


class Rule(Protocol):
    """The arithmetic of an optimizer."""

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The state it keeps, under PyTorch's names."""
        ...

    def scalars(self, group: Mapping[str, object], step: int) -> Scalars:
        """What is the same for all elements, from the group's settings, in float64."""
        ...

    def update(
        self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], scalars: Scalars
    ) -> None:
        """Change the parameter and its state in place; all float32 `[N]`."""
        ...

    def update_8bit(
        self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], scalars: Scalars
    ) -> None:
        """The same with codes, uint8 `[N]`, and scales of each moment in turn."""
        ...


class AdamWRule:
    """Decoupled weight decay and bias correction. Source: arXiv:1711.05101."""

    moments = (Moment("exp_avg"), Moment("exp_avg_sq", signed=False))

    def scalars(self, group: Mapping[str, object], step: int) -> Scalars:
        """Those of the operator `adamw_step`, in its order."""
        rate, eps, weight_decay = (number(group, name) for name in ("lr", "eps", "weight_decay"))
        beta1, beta2 = pair(group, "betas")
        return (
            1 - rate * weight_decay,
            1 - beta1,
            beta2,
            1 - beta2,
            (1 - beta2**step) ** 0.5,
            eps,
            -(rate / (1 - beta1**step)),
        )

    def update(
        self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], scalars: Scalars
    ) -> None:
        """One operator, so that a kernel can do it in one pass over memory."""
        exp_avg, exp_avg_sq = state
        torch.ops.halfbyte.adamw_step(param, grad, exp_avg, exp_avg_sq, *scalars)

    def update_8bit(
        self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], scalars: Scalars
    ) -> None:
        """Decode, update, encode."""
        _update_decoded(self, param, grad, state, scalars)


class LionRule:
    """The sign of an interpolated momentum. Source: arXiv:2302.06675, algorithm 2."""

    moments = (Moment("exp_avg"),)

    def scalars(self, group: Mapping[str, object], step: int) -> Scalars:  # noqa: ARG002
        """Decay, the two interpolation weights, and the learning rate."""
        rate, weight_decay = number(group, "lr"), number(group, "weight_decay")
        beta1, beta2 = pair(group, "betas")
        return 1 - rate * weight_decay, 1 - beta1, 1 - beta2, rate

    def update(
        self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], scalars: Scalars
    ) -> None:
        """Decay, step by the sign, then the momentum."""
        decay, weight1, weight2, rate = scalars
        (exp_avg,) = state
        if decay != 1.0:
            param.mul_(decay)
        param.add_(exp_avg.lerp(grad, weight1).sign_(), alpha=-rate)
        exp_avg.lerp_(grad, weight2)

    def update_8bit(
        self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], scalars: Scalars
    ) -> None:
        """Decode, update, encode."""
        _update_decoded(self, param, grad, state, scalars)


class SGDRule:
    """Heavy-ball momentum and coupled weight decay, as `torch.optim.SGD`."""

    moments = (Moment("momentum_buffer"),)

    def scalars(self, group: Mapping[str, object], step: int) -> Scalars:  # noqa: ARG002
        """Weight decay, momentum and the learning rate."""
        return tuple(number(group, name) for name in ("weight_decay", "momentum", "lr"))

    def update(
        self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], scalars: Scalars
    ) -> None:
        """The buffer starts at zero, which makes the first step PyTorch's."""
        weight_decay, momentum, rate = scalars
        (buffer,) = state
        if weight_decay:
            grad = grad.add(param, alpha=weight_decay)
        buffer.mul_(momentum).add_(grad)
        param.add_(buffer, alpha=-rate)

    def update_8bit(
        self, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], scalars: Scalars
    ) -> None:
        """Decode, update, encode."""
        _update_decoded(self, param, grad, state, scalars)


def _update_decoded(
    rule: Rule, param: Tensor, grad: Tensor, state: tuple[Tensor, ...], scalars: Scalars
) -> None:
    stored = [
        (codes, scales, moment.table(param.device))
        for moment, codes, scales in zip(rule.moments, state[::2], state[1::2], strict=True)
    ]
    decoded = tuple(torch.empty_like(param) for _ in stored)
    for moment, (codes, scales, table) in zip(decoded, stored, strict=True):
        torch.ops.halfbyte.dequantize_8bit(codes, table, scales, BLOCK_SIZE, moment)
    rule.update(param, grad, decoded, scalars)
    for moment, (codes, scales, table) in zip(decoded, stored, strict=True):
        new_codes, new_scales = torch.ops.halfbyte.quantize_8bit(moment, table, BLOCK_SIZE)
        codes.copy_(new_codes)
        scales.copy_(new_scales)


def number(group: Mapping[str, object], name: str) -> float:
    """A setting of a group as float; schedulers may store it as a tensor of one element."""
    value = group[name]
    return value.item() if isinstance(value, Tensor) else float(value)  # type: ignore[arg-type]


def pair(group: Mapping[str, object], name: str) -> tuple[float, float]:
    """A setting of a group that holds two floats."""
    values = group[name]
    if not isinstance(values, Sequence) or len(values) != 2:  # noqa: PLR2004
        raise UsageError(f"{name}: two numbers expected, found {values!r}")
    return float(values[0]), float(values[1])

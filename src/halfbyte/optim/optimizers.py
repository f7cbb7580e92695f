"""The optimizers: AdamW, Lion and SGD, with state in 32 or 8 bits, resident or paged.

How this differs from bitsandbytes: paging works on CPUs and for tensors of all sizes, under a
budget that can be watched and changed during a run; and paged results are those of the
resident optimizer, bit for bit, also across export and import.
"""

from pathlib import Path
from typing import TypedDict, Unpack

from halfbyte.optim.optimizer import Params, StatefulOptimizer
from halfbyte.optim.paging import Paging
from halfbyte.optim.rules import AdamWRule, LionRule, SGDRule

Betas = tuple[float, float]


class AdamWSettings(TypedDict, total=False):
    """The settings of `AdamW` that its variants pass on."""

    lr: float
    betas: Betas
    eps: float
    weight_decay: float


class AdamW(StatefulOptimizer):
    """AdamW: decoupled weight decay, bias correction.

    With `state_bits=32` and float32 parameters every bit is that of `torch.optim.AdamW`
    (`foreach` or not; its `fused` body rounds differently by itself). Parameters in 16 bits are
    updated in float32 and rounded once a step; their state is float32 or 8 bits all the same.

    Raises:
        UsageError: A setting is out of its range.
        UnsupportedError: A parameter cannot be optimized here; see the message.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        paging: Paging | None = None,
    ) -> None:
        """Take over parameters.

        Args:
            params: Parameters, (name, parameter) pairs, or groups of either with own settings.
            lr: Learning rate.
            betas: Decay of the two moments.
            eps: Added to the denominator.
            weight_decay: Part of a parameter, times the learning rate, that a step takes away.
            state_bits: 32, or 8 for block-wise 8-bit moments (26 % of the bytes).
            paging: Keep the state within a budget; by default it is all resident.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, rule=AdamWRule(), state_bits=state_bits, paging=paging)


class AdamW8bit(AdamW):
    """`AdamW` with 8-bit state."""

    def __init__(self, params: Params, **settings: Unpack[AdamWSettings]) -> None:
        super().__init__(params, state_bits=8, **settings)


class PagedAdamW(AdamW):
    """`AdamW` whose state stays within a budget and spills to a slower tier."""

    def __init__(
        self,
        params: Params,
        *,
        fast_bytes: int,
        directory: Path | None = None,
        page_bytes: int | None = None,
        state_bits: int = 32,
        **settings: Unpack[AdamWSettings],
    ) -> None:
        """As `AdamW`, with the settings of `Paging`."""
        paging = Paging(fast_bytes, directory, page_bytes)
        super().__init__(params, state_bits=state_bits, paging=paging, **settings)


class PagedAdamW8bit(PagedAdamW):
    """`PagedAdamW` with 8-bit state."""

    def __init__(
        self,
        params: Params,
        *,
        fast_bytes: int,
        directory: Path | None = None,
        page_bytes: int | None = None,
        **settings: Unpack[AdamWSettings],
    ) -> None:
        """As `PagedAdamW`."""
        super().__init__(
            params,
            fast_bytes=fast_bytes,
            directory=directory,
            page_bytes=page_bytes,
            state_bits=8,
            **settings,
        )


class Lion(StatefulOptimizer):
    """Lion: steps of the same size everywhere, by the sign of a momentum; half of AdamW's state.

    Raises:
        UsageError: A setting is out of its range.
        UnsupportedError: A parameter cannot be optimized here.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        state_bits: int = 32,
        paging: Paging | None = None,
    ) -> None:
        """As `AdamW`, without `eps`."""
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, rule=LionRule(), state_bits=state_bits, paging=paging)


class SGD(StatefulOptimizer):
    """SGD with heavy-ball momentum and coupled weight decay, as `torch.optim.SGD`.

    Raises:
        UsageError: A setting is out of its range.
        UnsupportedError: A parameter cannot be optimized here.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        state_bits: int = 32,
        paging: Paging | None = None,
    ) -> None:
        """As `AdamW`, with `momentum` for `betas`."""
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, rule=SGDRule(), state_bits=state_bits, paging=paging)

"""Optimizers by the name a config gives, and groups for weight decay."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.memory.layout import PAGE_BYTES, Item
from halfbyte.optim.optimizer import Params, StatefulOptimizer
from halfbyte.optim.optimizers import SGD, AdamW, Lion
from halfbyte.optim.paging import Paging
from halfbyte.optim.rules import AdamWRule, LionRule, Rule, SGDRule
from halfbyte.optim.state import state_format

_KINDS: dict[str, Callable[..., StatefulOptimizer]] = {"adamw": AdamW, "lion": Lion, "sgd": SGD}
_RULES: dict[str, Rule] = {"adamw": AdamWRule(), "lion": LionRule(), "sgd": SGDRule()}

NAMES = tuple(
    f"{paged}{kind}{bits}" for kind in _KINDS for paged in ("", "paged_") for bits in ("", "_8bit")
)
"""`adamw`, `adamw_8bit`, `paged_adamw`, `paged_adamw_8bit`, and the same of `lion` and `sgd`."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes an optimizer comes to hold, known before it is made.

    Attributes:
        state: Of its state, without padding.
        gradients: Of all gradients in float32.
        resident: Of both, what is in fast memory at most.
    """

    state: int
    gradients: int
    resident: int


def footprint(name: str, sizes: Iterable[int], *, fast_bytes: int | None = None) -> Footprint:
    """What an optimizer of that name holds for float32 parameters.

    Args:
        name: One of `NAMES`.
        sizes: Elements of each parameter.
        fast_bytes: Budget of a paged optimizer. A page's bytes are added for padding; without
            paging everything is resident.

    Raises:
        UsageError: There is no such name.
    """
    _require_name(name)
    rule = _RULES[_kind(name)]
    bits = 8 if name.endswith("_8bit") else 32
    state = gradients = 0
    for size in sizes:
        fields = state_format(rule, bits=bits, num_elements=size).fields
        state += Item("", size, fields).num_bytes
        gradients += 4 * size
    both = state + gradients
    resident = both if fast_bytes is None else min(both + PAGE_BYTES, fast_bytes)
    return Footprint(state, gradients, resident)


class Group(TypedDict):
    """Named parameters that share a weight decay."""

    params: list[tuple[str, Tensor]]
    weight_decay: float


def make_optimizer(
    name: str,
    params: Params,
    *,
    fast_bytes: int | None = None,
    directory: Path | None = None,
    page_bytes: int | None = None,
    **settings: float | tuple[float, float],
) -> StatefulOptimizer:
    """The optimizer of that name.

    Args:
        name: One of `NAMES`.
        params: As `AdamW`.
        fast_bytes: Budget of a paged optimizer, in bytes.
        directory: For its file.
        page_bytes: Bytes of its pages; by default as the budget allows.
        settings: `lr` and others that the optimizer has.

    Raises:
        UsageError: There is no such name or setting, a paged one lacks its budget, or another one
            has one.
    """
    _require_name(name)
    kind = _KINDS[_kind(name)]
    paged = name.startswith("paged_")
    if paged != (fast_bytes is not None):
        expected = "expected" if paged else "not expected"
        raise UsageError(f"fast_bytes: {expected} with optimizer {name!r}")
    known = inspect.signature(kind).parameters.keys() - {"params", "state_bits", "paging"}
    if unknown := sorted(settings.keys() - known):
        raise UsageError(
            f"optimizer {name!r} has no such settings",
            problems=[f"{each}: one of {', '.join(sorted(known))} expected" for each in unknown],
        )
    paging = None if fast_bytes is None else Paging(fast_bytes, directory, page_bytes)
    bits = 8 if name.endswith("_8bit") else 32
    return kind(params, state_bits=bits, paging=paging, **settings)


def weight_decay_groups(
    named_params: Iterable[tuple[str, Tensor]], weight_decay: float
) -> list[Group]:
    """Two groups: matrices, which decay, and vectors (norms, biases), which do not.

    Parameters that do not require a gradient are left out, and so is an empty group.
    """
    trained = [(name, param) for name, param in named_params if param.requires_grad]
    groups: list[Group] = [
        {"params": [(n, p) for n, p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _kind(name: str) -> str:
    return name.removeprefix("paged_").removesuffix("_8bit")


def _require_name(name: str) -> None:
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        raise UsageError(
            f"unknown optimizer {name!r}; known: {', '.join(NAMES)}",
            hint=f"Did you mean {close[0]!r}?" if close else "",
        )

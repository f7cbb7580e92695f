"""Optimizers by the name a config gives, and groups for weight decay."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.memory.pool import PAGE_BYTES
from halfbyte.optim.optimizer import Params, StatefulOptimizer
from halfbyte.optim.optimizers import SGD, AdamW, Lion
from halfbyte.optim.paging import Paging

_KINDS: dict[str, Callable[..., StatefulOptimizer]] = {"adamw": AdamW, "lion": Lion, "sgd": SGD}

NAMES = tuple(
    f"{paged}{kind}{bits}" for kind in _KINDS for paged in ("", "paged_") for bits in ("", "_8bit")
)
"""`adamw`, `adamw_8bit`, `paged_adamw`, `paged_adamw_8bit`, and the same of `lion` and `sgd`."""


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
    page_bytes: int = PAGE_BYTES,
    **settings: float | tuple[float, float],
) -> StatefulOptimizer:
    """The optimizer of that name.

    Args:
        name: One of `NAMES`.
        params: As `AdamW`.
        fast_bytes: Budget of a paged optimizer, in bytes.
        directory: For its file.
        page_bytes: Bytes of its pages.
        settings: `lr` and others that the optimizer has.

    Raises:
        UsageError: There is no such name or setting, a paged one lacks its budget, or another one
            has one.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        raise UsageError(
            f"unknown optimizer {name!r}; known: {', '.join(NAMES)}",
            hint=f"Did you mean {close[0]!r}?" if close else "",
        )
    kind = _KINDS[name.removeprefix("paged_").removesuffix("_8bit")]
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

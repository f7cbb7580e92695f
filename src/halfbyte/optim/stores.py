"""Where an optimizer's state is: in plain tensors, or in a pool of pages.

A `memory.pool.Pool` is a store as it stands. The resident store is the plain one.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.memory.layout import Item
from halfbyte.memory.stats import PoolStats
from halfbyte.memory.walks import Chunk

CHUNK_ELEMENTS = 2**18
"""A step works on so many elements at a time: what it needs besides them stays in the cache."""


class Store(Protocol):
    """Items, all zero at first, to be walked over and changed in place."""

    @property
    def items(self) -> Sequence[Item]:
        """All items; an item's number is its place."""
        ...

    def add(self, items: Sequence[Item]) -> range:
        """Append items and return their numbers."""
        ...

    def walk(self, items: Collection[int] | None = None, *, spend: bool = False) -> Iterator[Chunk]:
        """Visit the parts of items, to change them in place; `spend` what is beside them."""
        ...

    def read(self, item: int) -> tuple[Tensor, ...]:
        """An item's fields, each flat."""
        ...

    def write(self, item: int, values: Sequence[Tensor]) -> None:
        """Replace an item's fields."""
        ...

    def require_usable(self) -> None:
        """Raise if a walk cannot begin."""
        ...

    def stats(self) -> PoolStats:
        """What is held and has been moved."""
        ...


class ResidentStore:
    """Every field a tensor of its own, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._items: list[Item] = []
        self._values: list[tuple[Tensor, ...]] = []

    @property
    def items(self) -> Sequence[Item]:
        """All items; an item's number is its place."""
        return self._items

    def add(self, items: Sequence[Item]) -> range:
        """Append items, all zero, and return their numbers."""
        first = len(self._items)
        for item in items:
            self._values.append(
                tuple(
                    torch.zeros(
                        field.count(item.num_elements), dtype=field.dtype, device=self._device
                    )
                    for field in item.fields
                )
            )
            self._items.append(item)
        return range(first, len(self._items))

    def walk(
        self,
        items: Collection[int] | None = None,
        *,
        spend: bool = False,  # noqa: ARG002  (nothing is beside resident items)
    ) -> Iterator[Chunk]:
        """Visit the items in order, large ones in several chunks."""
        for number in sorted(items) if items is not None else range(len(self._items)):
            item = self._items[number]
            step = max(CHUNK_ELEMENTS // item.granule, 1) * item.granule
            for begin in range(0, item.num_elements, step):
                end = min(begin + step, item.num_elements)
                values = tuple(
                    value[begin // field.elements : field.count(end)]
                    for field, value in zip(item.fields, self._values[number], strict=True)
                )
                yield Chunk(number, begin, end, values)

    def read(self, item: int) -> tuple[Tensor, ...]:
        """An item's fields themselves, not copies."""
        return self._values[item]

    def write(self, item: int, values: Sequence[Tensor]) -> None:
        """Replace an item's fields."""
        for value, new in zip(self._values[item], values, strict=True):
            value.copy_(new.reshape(-1))

    def require_usable(self) -> None:
        """Nothing can have failed."""

    def stats(self) -> PoolStats:
        """All is resident, nothing moves."""
        held = sum(item.num_bytes for item in self._items)
        return PoolStats(
            fast_bytes=held, total_bytes=held, resident_bytes=held, peak_resident_bytes=held
        )

"""How values of all sizes are laid out in pages.

An item is a run of elements, each with the same fields: optimizer state of one parameter has
two float32 values an element, or two 8-bit codes an element and two scales every 256. Items
follow each other through the pages; one that does not fit is cut between blocks, so that a
part of an item can be worked on by itself. Small items share a page.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; every field of a part starts on a cache line, which is also the widest vector."""
PAGE_BYTES = 2**22
"""Large enough for a disk to reach its speed."""
SMALL_PAGE_BYTES = 2**18
"""Below this a page costs more processor time than it saves in waiting."""

_PAGES_TO_OVERLAP = 8  # two at work, three on their way, and as many leaving


def page_bytes_for(fast_bytes: int) -> int:
    """The largest pages of which a budget has enough for transfers to overlap the work."""
    wanted = 1 << max(fast_bytes // _PAGES_TO_OVERLAP, 1).bit_length() - 1
    return min(max(wanted, SMALL_PAGE_BYTES), PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class Field:
    """One kind of value that an item holds.

    Attributes:
        name: For messages and files.
        dtype: Of each value.
        elements: How many consecutive elements share a value.
    """

    name: str
    dtype: torch.dtype
    elements: int = 1

    def count(self, num_elements: int) -> int:
        """Values for that many elements."""
        return -(-num_elements // self.elements)

    def num_bytes(self, num_elements: int) -> int:
        """Bytes for that many elements."""
        return self.count(num_elements) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Item:
    """A run of elements with the same fields, zero at first.

    Attributes:
        name: For messages and files.
        num_elements: Its length.
        fields: What each element, or so many together, holds.
        cut: It may be cut only between so many elements, if its fields do not ask for more.
    """

    name: str
    num_elements: int
    fields: tuple[Field, ...]
    cut: int = ALIGNMENT

    @property
    def num_bytes(self) -> int:
        """Bytes of all fields, without padding."""
        return sum(field.num_bytes(self.num_elements) for field in self.fields)

    @property
    def granule(self) -> int:
        """Elements between places where the item may be cut."""
        return math.lcm(ALIGNMENT, self.cut, *(field.elements for field in self.fields))


@dataclass(frozen=True, slots=True)
class Part:
    """Elements `begin` to `end` of an item, and where in a page each field of them starts."""

    item: int
    begin: int
    end: int
    offsets: tuple[int, ...]

    def views(
        self, page: Tensor, fields: tuple[Field, ...], begin: int, end: int
    ) -> tuple[Tensor, ...]:
        """The values of each field, as flat tensors over the bytes of the page.

        Args:
            page: Its buffer, uint8.
            fields: Of the item.
            begin: The first element wanted, at a place where the item may be cut.
            end: One behind the last.
        """
        return tuple(
            page[
                offset + field.num_bytes(begin - self.begin) : offset
                + field.num_bytes(end - self.begin)
            ].view(field.dtype)
            for offset, field in zip(self.offsets, fields, strict=True)
        )


def smallest_page(items: Sequence[Item]) -> int:
    """Bytes a page must have so that at least one granule of each item fits."""
    return max((_padded_bytes(item.fields, item.granule) for item in items), default=0)


def lay_out(items: Sequence[Item], *, first: int, page_bytes: int) -> list[list[Part]]:
    """The parts in each of as many pages as the items need, in order.

    Args:
        items: To lay out; item numbers count on from `first`.
        first: Number of the first item.
        page_bytes: Bytes of a page, at least `smallest_page(items)`.
    """
    pages: list[list[Part]] = []
    used = page_bytes  # as if a page before the first were full
    for number, item in enumerate(items, start=first):
        begin = 0
        while begin < item.num_elements:
            count = _fitting(item, item.num_elements - begin, page_bytes - used)
            if not count:
                pages.append([])
                used = 0
                continue
            offsets = tuple(_offsets(item.fields, count, used))
            pages[-1].append(Part(number, begin, begin + count, offsets))
            used += _padded_bytes(item.fields, count)
            begin += count
    return pages


def _fitting(item: Item, wanted: int, room: int) -> int:
    """How many of the wanted elements fit: all, or a multiple of the granule."""
    if _padded_bytes(item.fields, wanted) <= room:
        return wanted
    granule = item.granule
    each = sum(field.num_bytes(granule) for field in item.fields)
    count = min(room // each, wanted // granule)
    while count and _padded_bytes(item.fields, count * granule) > room:
        count -= 1
    return count * granule


def _padded_bytes(fields: tuple[Field, ...], count: int) -> int:
    return sum(_aligned(field.num_bytes(count)) for field in fields)


def _offsets(fields: tuple[Field, ...], count: int, start: int) -> Iterator[int]:
    for field in fields:
        yield start
        start += _aligned(field.num_bytes(count))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT

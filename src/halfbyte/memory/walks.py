"""The order in which pages are worked on, one by one or two together.

Two items of the same length may be *paired*: an element of one belongs to the element of the other
at the same place, as a gradient to its parameter's state. They are laid out in pages of their
own, which move separately; a walk over one brings in those of the other beside it. Pages that
hold more of one item than of the other are therefore stopped at several times in a row.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from halfbyte.memory.layout import Item, Part
from halfbyte.memory.transfers import Page

Places = Mapping[int, Sequence[tuple[Page, Part]]]
"""Where each item is, by its number, in the order of its elements."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an item at work: views to be changed in place.

    Attributes:
        item: Its number.
        begin: The first element.
        end: One behind the last.
        values: Each field, flat.
        beside: Each field of the same elements of the item it is paired with, if it is.
    """

    item: int
    begin: int
    end: int
    values: tuple[Tensor, ...]
    beside: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `begin` to `end` of a part, and the part that holds what is beside them."""

    part: Part
    begin: int
    end: int
    beside: Part | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """Pages at work together: one, or one and the other that is beside it."""

    pages: tuple[Page, ...]
    pieces: tuple[Piece, ...]

    def chunks(self, items: Sequence[Item]) -> Iterator[Chunk]:
        """The pieces as views; all pages have their buffers."""
        for piece in self.pieces:
            views = [
                part.views(page.ready, items[part.item].fields, piece.begin, piece.end)
                for page, part in zip(self.pages, (piece.part, piece.beside), strict=False)
                if part is not None
            ]
            yield Chunk(piece.part.item, piece.begin, piece.end, *views)


@dataclass(slots=True)
class Walk:
    """Stops in order, how far it is, and how far ahead pages have been asked for.

    Attributes:
        stops: All of it.
        pages: All pages, in the order of walks.
        order: Pages as they are needed; one may come again.
        at: The place in `order` of the page that arrived last.
        ahead: The first place in `order` that was not asked for.
        pinned: Pages at work, which must stay.
        repays: What is on loan is given back as it goes.
        replaces: All of what it visits is written, so nothing has to be there before.
    """

    stops: Sequence[Stop]
    pages: Sequence[Page]
    repays: bool = False
    replaces: bool = False
    order: list[Page] = field(default_factory=list)
    at: int = -1
    ahead: int = 0
    pinned: tuple[Page, ...] = ()
    _passed: deque[Page] | None = None

    def __post_init__(self) -> None:
        """Put the pages in order."""
        before: tuple[Page, ...] = ()
        for stop in self.stops:
            self.order += [page for page in stop.pages if page not in before]
            before = stop.pages

    @property
    def passed(self) -> deque[Page]:
        """Pages that are not needed any more, in the order to give them up."""
        if self._passed is None:
            asked = set(self.order)
            self._passed = deque(page for page in reversed(self.pages) if page not in asked)
        return self._passed

    def victim(self, *, urgent: bool) -> Page | None:
        """The page to give up: passed longest ago; if it must be, the one needed last."""
        while self.passed:
            page = self.passed.popleft()
            if page.buffer is not None and page not in self.pinned:
                return page
        if urgent:
            for place in range(len(self.order) - 1, self.at, -1):
                page = self.order[place]
                if page.buffer is not None and page not in self.pinned:
                    self.ahead = min(self.ahead, place)
                    return page
        return None

    def last_uses(self) -> dict[Page, int]:
        """The number of the last stop at each page."""
        return {page: number for number, stop in enumerate(self.stops) for page in stop.pages}


def stops_at(
    page: Page, *, wanted: Collection[int] | None, beside: Places, forward: bool
) -> list[Stop]:
    """The stops at a page.

    Args:
        page: To be visited.
        wanted: Numbers of the items to visit; None for all.
        beside: Where what is paired with an item is, by the item's number.
        forward: Whether the walk goes from first to last.
    """
    alone: list[Piece] = []
    together: dict[Page, list[Piece]] = {}
    for part in page.parts:
        if wanted is not None and part.item not in wanted:
            continue
        if part.item not in beside:
            alone.append(Piece(part, part.begin, part.end))
            continue
        for other_page, other in beside[part.item]:
            begin, end = max(part.begin, other.begin), min(part.end, other.end)
            if begin < end:
                together.setdefault(other_page, []).append(Piece(part, begin, end, other))
    stops = [Stop((page,), tuple(alone))] if alone else []
    stops += [Stop((page, other), tuple(pieces)) for other, pieces in together.items()]
    return stops if forward else stops[::-1]

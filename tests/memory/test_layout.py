"""Every element of every item has exactly one place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.memory.layout import ALIGNMENT, Field, Item, Part, lay_out, smallest_page

FLOAT = (Field("exp_avg", torch.float32), Field("exp_avg_sq", torch.float32))
BYTES = (Field("codes", torch.uint8), Field("scales", torch.float32, 256))


def test_field_counts_round_up() -> None:
    assert [BYTES[1].count(n) for n in (0, 1, 256, 257)] == [0, 1, 1, 2]
    assert BYTES[1].num_bytes(257) == 8
    assert Item("x", 300, BYTES).num_bytes == 308
    assert Item("x", 300, BYTES).granule == 256


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 6000), st.booleans()), max_size=12),
    page_blocks=st.integers(1, 4),
    first=st.integers(0, 3),
)
def test_parts_cover_items_once_and_do_not_overlap(
    sizes: list[tuple[int, bool]], page_blocks: int, first: int
) -> None:
    items = [Item(str(n), size, FLOAT if f else BYTES) for n, (size, f) in enumerate(sizes)]
    page_bytes = page_blocks * 4096
    assert smallest_page(items) <= page_bytes
    pages = lay_out(items, first=first, page_bytes=page_bytes)
    reached = dict.fromkeys(range(first, first + len(items)), 0)
    for parts in pages:
        assert parts, "no empty page"
        end_of_last = 0
        for part in parts:
            item = items[part.item - first]
            assert part.begin == reached[part.item], "in order, without a gap"
            assert part.begin % item.granule == 0
            reached[part.item] = part.end
            for field, offset in zip(item.fields, part.offsets, strict=True):
                assert offset % ALIGNMENT == 0
                assert offset >= end_of_last
                end_of_last = offset + field.num_bytes(part.end - part.begin)
        assert end_of_last <= page_bytes
    assert reached == {first + n: item.num_elements for n, item in enumerate(items)}
    used = sum(item.num_bytes for item in items)
    padding = (ALIGNMENT - 1) * 2 * sum(map(len, pages))
    wasted = len(pages) * smallest_page(items)
    assert len(pages) * page_bytes <= used + padding + wasted + page_bytes


def test_views_are_of_the_page_itself() -> None:
    page = torch.zeros(4096, dtype=torch.uint8)
    part = Part(0, 256, 556, (0, 320))
    codes, scales = part.views(page, BYTES, part.begin, part.end)
    assert (codes.shape, scales.shape) == ((300,), (2,))
    codes.fill_(7)
    scales.fill_(1.5)
    assert page[:300].eq(7).all()
    assert page[300:320].eq(0).all()
    assert page[320:328].view(torch.float32).tolist() == [1.5, 1.5]


@pytest.mark.parametrize("fields", [FLOAT, BYTES])
def test_the_smallest_page_takes_one_granule(fields: tuple[Field, ...]) -> None:
    item = Item("x", 10 * 256, fields)
    pages = lay_out([item], first=0, page_bytes=smallest_page([item]))
    assert [part.end - part.begin for parts in pages for part in parts] == [item.granule] * (
        2560 // item.granule
    )

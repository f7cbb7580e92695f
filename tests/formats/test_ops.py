"""The operators as PyTorch sees them, and corners of their reference bodies."""

import pytest
import torch
from torch import Tensor

from halfbyte.formats.codebooks import DYNAMIC_MAP, FP4, NF4, Codebook
from halfbyte.formats.ops import EMPTY_TAIL_SCALE, quantize_4bit_reference

CHECKS = ("test_schema", "test_faketensor")


def arguments(dtype: torch.dtype) -> dict[str, tuple[object, ...]]:
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scales = quantize_4bit_reference(x, NF4.table(), 64)
    table, none = DYNAMIC_MAP.table(), (None, None, 0.0, 0)
    return {
        "quantize_4bit": (x, NF4.table(), 64),
        "quantize_8bit": (x, table, 64),
        "dequantize_4bit": (codes, NF4.table(), scales, *none, 64, torch.empty_like(x)),
        "dequantize_8bit": (torch.zeros(77).byte(), table, scales, 64, torch.empty_like(x)),
    }


@pytest.mark.parametrize("name", arguments(torch.float32))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schemas_and_shapes(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(
        getattr(torch.ops.halfbyte, name).default, arguments(dtype)[name], test_utils=CHECKS
    )


@pytest.mark.parametrize(("book", "code"), [(NF4, 7), (FP4, 0)], ids=["nf4", "fp4"])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 129])
def test_zeros(book: Codebook, code: int, count: int) -> None:
    codes, scales = quantize_4bit_reference(torch.zeros(count), book.table(), 64)
    assert set(codes.tolist()) == {code << 4 | code}
    tail = [torch.tensor(EMPTY_TAIL_SCALE).item()] if count % 64 else []
    assert scales.tolist() == [0.0] * (count // 64) + tail


@pytest.mark.parametrize("sign", [1, -1])
def test_a_tie_takes_the_lower_value(sign: int) -> None:
    table = torch.tensor([(i - 8) / 8 for i in range(16)])
    middles = (table[:-1] + table[1:]) / 2
    x = torch.cat((torch.tensor([-1.0]), middles)).repeat(4)
    codes, scales = quantize_4bit_reference(x * sign, table, 64)
    values = table[unpacked(codes).long()] * scales
    expected = torch.where(x == -1, x, x * sign - 1 / 16)
    assert torch.equal(values[x != -1], expected[x != -1])


def unpacked(codes: Tensor) -> Tensor:
    return torch.stack((codes >> 4, codes & 15), dim=1).reshape(-1)


def test_the_earlier_element_is_the_high_nibble_and_an_odd_end_is_padded_with_zero() -> None:
    x = torch.tensor([1.0, -1.0, 1.0])
    codes, _ = quantize_4bit_reference(x, NF4.table(), 32)
    assert codes.tolist() == [0xF0, 0xF7]

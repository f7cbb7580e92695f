"""Wrong arguments give errors that name every problem, and never a crash."""

import random

import pytest
import torch
from torch import Tensor

from halfbyte.formats.codebooks import DYNAMIC_MAP, NF4
from halfbyte.formats.double_quantization import double_quantize
from halfbyte.kernels import backends

pytestmark = pytest.mark.skipif(not backends.native_in_use(), reason="native kernels are absent")

native = torch.ops.halfbyte
COUNT = 1000


def dequantize_arguments() -> dict[str, object]:
    x = torch.randn(COUNT)
    codes, scales = native.quantize_4bit(x, NF4.table(), 64)
    double = double_quantize(scales)
    return {
        "codes": codes,
        "table": NF4.table(),
        "scales": double.codes,
        "nested_table": DYNAMIC_MAP.table(),
        "nested_scales": double.scales,
        "nested_offset": double.offset,
        "nested_block_size": 256,
        "block_size": 64,
        "out": torch.empty(COUNT, dtype=torch.bfloat16),
    }


def misaligned(t: Tensor) -> Tensor:
    """The same values at an odd address."""
    raw = torch.empty(t.numel() * t.element_size() + 1, dtype=torch.uint8)
    shifted = torch.frombuffer(raw.numpy().data, dtype=t.dtype, offset=1, count=t.numel())
    return shifted.copy_(t.reshape(-1))


def test_the_arguments_are_good() -> None:
    native.dequantize_4bit(*dequantize_arguments().values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("codes", torch.zeros(499, dtype=torch.uint8), "codes: .* 500 elements"),
        ("codes", torch.zeros(501, dtype=torch.uint8), "codes: .* 500 elements"),
        ("codes", torch.zeros(500, dtype=torch.int8), "codes: .* Byte"),
        ("codes", torch.zeros(1000, dtype=torch.uint8)[::2], "not contiguous"),
        ("table", torch.zeros(15), "table: .* 16 elements"),
        ("table", torch.zeros(16, dtype=torch.float64), "table: .* Float"),
        ("table", torch.full((16,), float("nan")), "table: finite"),
        ("scales", torch.zeros(16), "scales: .* Byte"),
        ("scales", torch.zeros(15, dtype=torch.uint8), "scales: .* 16 elements"),
        ("nested_table", torch.zeros(255), "nested_table: .* 256 elements"),
        ("nested_table", None, "both or neither"),
        ("nested_scales", None, "both or neither"),
        ("nested_scales", torch.zeros(0), "nested_scales: .* 1 elements"),
        ("nested_block_size", 0, "nested_block_size: at least 1"),
        ("nested_block_size", -256, "nested_block_size: at least 1"),
        ("nested_block_size", 3, "nested_scales: .* 6 elements"),
        ("block_size", 0, "block_size: a power of two"),
        ("block_size", -64, "block_size: a power of two"),
        ("block_size", 48, "block_size: a power of two"),
        ("block_size", 16, "block_size: a power of two"),
        ("block_size", 2**62, "block_size: a power of two"),
        ("block_size", 128, "scales: .* 8 elements"),
        ("out", torch.empty(COUNT + 1), "codes: .* 501 elements"),
        ("out", torch.empty(COUNT, dtype=torch.float64), "out: .* float32"),
        ("out", torch.empty(2 * COUNT)[::2], "out: contiguous"),
    ],
)
def test_dequantize_4bit_names_the_wrong_argument(name: str, value: object, message: str) -> None:
    arguments = dequantize_arguments() | {name: value}
    with pytest.raises(RuntimeError, match=message):
        native.dequantize_4bit(*arguments.values())


@pytest.mark.parametrize("name", ["table", "nested_table", "nested_scales", "out"])
def test_misaligned_memory_is_refused(name: str) -> None:
    arguments = dequantize_arguments()
    tensor = arguments[name]
    assert isinstance(tensor, Tensor)
    arguments[name] = misaligned(tensor)
    with pytest.raises(RuntimeError, match=f"{name}: .*aligned"):
        native.dequantize_4bit(*arguments.values())


def test_all_problems_are_in_one_message() -> None:
    arguments = dequantize_arguments() | {"table": torch.zeros(3), "block_size": 5}
    with pytest.raises(RuntimeError, match=r"table: .*\n.*codes|block_size: .*\n.*table"):
        native.dequantize_4bit(*arguments.values())


@pytest.mark.parametrize("op", [native.quantize_4bit, native.quantize_8bit])
def test_quantize_names_the_wrong_argument(op: object) -> None:
    assert callable(op)
    table = NF4.table() if op is native.quantize_4bit else DYNAMIC_MAP.table()
    with pytest.raises(RuntimeError, match=r"x: .* float32, bfloat16 or float16"):
        op(torch.zeros(5, dtype=torch.int32), table, 64)
    with pytest.raises(RuntimeError, match=r"table: .* elements .*found Float \[5\]"):
        op(torch.zeros(5), torch.zeros(5), 64)
    for block_size in (0, -1, -(2**63)):
        with pytest.raises(RuntimeError, match="block_size: "):
            op(torch.zeros(5), table, block_size)
    with pytest.raises(RuntimeError, match="x: aligned"):
        op(misaligned(torch.zeros(5)), table, 64)


def test_quantize_8bit_refuses_an_unsorted_table() -> None:
    with pytest.raises(RuntimeError, match="table: ascending"):
        native.quantize_8bit(torch.zeros(5), DYNAMIC_MAP.table().flip(0), 64)


def test_dequantize_8bit_names_the_wrong_argument() -> None:
    table, codes, scales = DYNAMIC_MAP.table(), torch.zeros(9, dtype=torch.uint8), torch.zeros(3)
    out = torch.empty(9)
    native.dequantize_8bit(codes, table, scales, 4, out)
    for arguments, message in [
        ((codes[1:], table, scales, 4, out), "codes: .* 9 elements"),
        ((codes, table[1:], scales, 4, out), "table: .* 256 elements"),
        ((codes, table, scales[1:], 4, out), "scales: .* 3 elements"),
        ((codes, table, scales, 0, out), "block_size: at least 1"),
        ((codes, table, scales, -(2**63), out), "block_size: at least 1"),
        ((codes, table, scales, 4, out.double()), "out: .* float32"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            native.dequantize_8bit(*arguments)


def random_tensor(generator: random.Random) -> Tensor | None:
    dtype = generator.choice(
        [torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]
    )
    shape = generator.choice([(), (0,), (1,), (16,), (256,), (500,), (16, 0), (7, 9), (1000,)])
    tensor = torch.ones(shape, dtype=dtype)
    if generator.random() < 0.2 and tensor.dim():
        tensor = tensor.expand(3, *shape) if generator.random() < 0.5 else tensor[::2]
    if generator.random() < 0.1:
        tensor = tensor.to("meta")
    return None if generator.random() < 0.05 else tensor


def random_integer(generator: random.Random) -> int:
    return generator.choice(
        [0, 1, -1, 3, 32, 64, 256, 4096, 8192, 2**31, 2**62, 2**63 - 1, -(2**63)]
    )


EXPECTED_ERRORS = (RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError)
"""The last two come from the fake kernels, which serve tensors on the meta device."""


@pytest.mark.parametrize("seed", range(8))
def test_random_arguments_never_crash(seed: int) -> None:
    generator = random.Random(seed)  # noqa: S311  (not for secrets)
    accepted = 0
    for _ in range(150):
        arguments: dict[str, object] = dequantize_arguments()
        for name in generator.sample(list(arguments), generator.randint(1, 3)):
            integer = name.endswith("size")
            arguments[name] = random_integer(generator) if integer else random_tensor(generator)
            if name == "nested_offset":
                arguments[name] = generator.choice([0.0, 1e300, float("nan")])
        try:
            native.dequantize_4bit(*arguments.values())
            accepted += 1
        except EXPECTED_ERRORS:
            pass
        for op in (native.quantize_4bit, native.quantize_8bit):
            try:
                op(random_tensor(generator), random_tensor(generator), random_integer(generator))
                accepted += 1
            except EXPECTED_ERRORS:
                pass
    assert accepted < 300  # most of these are wrong


def test_schemas_fakes_and_mutation_are_what_they_say() -> None:
    x = torch.randn(3, 50)
    torch.library.opcheck(native.quantize_4bit.default, (x, NF4.table(), 64))
    torch.library.opcheck(native.quantize_8bit.default, (x, DYNAMIC_MAP.table(), 64))
    torch.library.opcheck(native.dequantize_4bit.default, tuple(dequantize_arguments().values()))
    codes, scales = native.quantize_8bit(x, DYNAMIC_MAP.table(), 64)
    dequantization = (codes, DYNAMIC_MAP.table(), scales, 64, torch.empty(150))
    torch.library.opcheck(native.dequantize_8bit.default, dequantization)

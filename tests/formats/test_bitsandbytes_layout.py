"""Files of 4-bit weights: ours in bitsandbytes, theirs in ours, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import halfbyte as hb
from halfbyte.errors import FormatError, UnsupportedError
from halfbyte.formats.bitsandbytes_layout import (
    from_bitsandbytes,
    part_specs,
    quantization_config,
    quantized_names,
    to_bitsandbytes,
)
from halfbyte.formats.codebooks import DYNAMIC_MAP, FOUR_BIT_CODEBOOKS, NF4, Codebook
from halfbyte.formats.double_quantization import double_quantize
from halfbyte.formats.safetensors_writer import SafetensorsWriter

NAME = "model.layers.0.self_attn.q_proj.weight"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (7, 9), (64, 256), (33, 100)]


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def state_of(parts: dict[str, Tensor], name: str = NAME) -> tuple[str, dict[str, Any]]:
    (key,) = (key for key in parts if key.startswith(f"{name}.quant_state."))
    return key, json.loads(bytes(parts[key].tolist()))


def pack(state: object) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def decoded_by(oracle: Any, codes: Tensor, state: Any) -> Tensor:
    """What bitsandbytes decodes, in the tensor's shape.

    Flat, as its CPU kernel for 2-D weights is wrong when blocks cross rows. Adding 0 makes -0 of 0:
    FP4's code 8 is one or the other there, by the size of the tensor.
    """
    shape = state.shape
    state.shape = torch.Size([shape.numel()])
    return oracle.dequantize_4bit(codes, state).view(shape) + 0.0


# Against bitsandbytes itself.


@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [64, 4096])
def test_bitsandbytes_reads_ours_and_we_read_theirs(
    book: str, dtype: torch.dtype, shape: tuple[int, ...], double_quant: bool, block_size: int
) -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    x = weight(shape, dtype)
    ours = hb.quantize(x, book, block_size=block_size, double_quant=double_quant)
    parts = to_bitsandbytes(NAME, ours)
    state_key, _ = state_of(parts)

    # Ours in theirs.
    state = oracle.QuantState.from_dict(
        {k.removeprefix(f"{NAME}."): v for k, v in parts.items() if k != NAME}, torch.device("cpu")
    )
    assert tuple(state.shape) == shape
    assert same_bits(decoded_by(oracle, parts[NAME], state), ours.dequantize() + 0.0)

    # Theirs in ours.
    codes, state = oracle.quantize_4bit(
        x, quant_type=book, blocksize=block_size, compress_statistics=double_quant
    )
    packed = state.as_dict(packed=True)
    theirs = {NAME: codes} | {f"{NAME}.{k}": v for k, v in packed.items()}
    assert list(theirs) == list(parts)
    read = from_bitsandbytes(NAME, theirs)
    assert (read.shape, read.dtype, read.block_size) == (x.shape, dtype, block_size)
    assert same_bits(read.dequantize() + 0.0, decoded_by(oracle, codes, state))

    # The same bytes: second-level codes may differ, as theirs are not always the nearest.
    for key, tensor in theirs.items():
        if key != f"{NAME}.absmax" or not double_quant:
            assert same_bits(tensor, parts[key]), key
    assert bytes(theirs[state_key].tolist()) == bytes(parts[state_key].tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("skip", [None, ["lm_head"]])
def test_config_is_that_of_transformers(
    dtype: torch.dtype, double_quant: bool, skip: list[str] | None
) -> None:
    transformers = pytest.importorskip("transformers")
    ours = quantization_config(
        "fp4", block_size=64, double_quant=double_quant, compute_dtype=dtype, skip_modules=skip
    )
    theirs = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )
    assert list(ours.items()) == list(theirs.to_dict().items())
    assert transformers.BitsAndBytesConfig.from_dict(ours).to_dict() == theirs.to_dict()


def test_config_of_int4_names_a_method_of_our_own() -> None:
    assert quantization_config("int4", block_size=32, double_quant=True, skip_modules=["x"]) == {
        "quant_method": "halfbyte",
        "codebook": "int4",
        "block_size": 32,
        "double_quant": True,
        "compute_dtype": "bfloat16",
        "skip_modules": ["x"],
    }


# Round trips through files, of every codebook.


@pytest.mark.parametrize("book", FOUR_BIT_CODEBOOKS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4)], ids=str)
def test_round_trip_through_a_file(
    tmp_path: Path, book: str, double_quant: bool, shape: tuple[int, ...]
) -> None:
    ours = hb.quantize(weight(shape), book, double_quant=double_quant)
    specs, late = part_specs(NAME, shape, book, block_size=64, double_quant=double_quant)
    parts = to_bitsandbytes(NAME, ours)
    with SafetensorsWriter.open(tmp_path / "x", specs, late=[late]) as writer:
        for key, tensor in parts.items():
            writer.write(key, tensor)
    loaded = load_file(tmp_path / "x")
    assert quantized_names(loaded) == {NAME}
    read = from_bitsandbytes(NAME, loaded)
    assert read.codebook == ours.codebook
    assert same_bits(read.dequantize(), ours.dequantize())
    assert {k: state_of(parts)[1][k] for k in ("quant_type", "blocksize", "dtype", "shape")} == {
        "quant_type": book,
        "blocksize": 64,
        "dtype": "float32",
        "shape": list(shape),
    }


def test_nothing_is_copied() -> None:
    parts = to_bitsandbytes(NAME, hb.quantize(weight((64, 64))))
    read = from_bitsandbytes(NAME, parts)
    assert read.codes.data_ptr() == parts[NAME].data_ptr()
    assert read.stored_scales.codes.data_ptr() == parts[f"{NAME}.absmax"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16, torch.float32])
def test_codes_stored_as_another_dtype(dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    x = weight((64, 64))
    ours = hb.quantize(x, double_quant=False)
    codes, _ = oracle.quantize_4bit(x, quant_type="nf4", quant_storage=dtype)
    assert codes.dtype == dtype
    parts = to_bitsandbytes(NAME, ours) | {NAME: codes}
    assert torch.equal(from_bitsandbytes(NAME, parts).codes, ours.codes)


def test_a_second_level_map_rounded_differently_is_used_as_it_is() -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    parts = to_bitsandbytes(NAME, hb.quantize(weight((64, 64))))
    table = parts[f"{NAME}.nested_quant_map"]
    parts[f"{NAME}.nested_quant_map"] = table.nextafter(torch.tensor(9.0))
    read = from_bitsandbytes(NAME, parts)
    assert read.stored_scales.codebook != DYNAMIC_MAP
    state = oracle.QuantState.from_dict(
        {k.removeprefix(f"{NAME}."): v for k, v in parts.items() if k != NAME}, torch.device("cpu")
    )
    assert same_bits(read.dequantize() + 0.0, decoded_by(oracle, parts[NAME], state))
    again = to_bitsandbytes(NAME, read.to("cpu"))
    assert all(same_bits(again[key], parts[key]) for key in parts)


# Refusals.


def test_a_codebook_of_ones_own_has_no_name_in_files() -> None:
    for book in (Codebook("mine", NF4.values), Codebook("nf4", NF4.values[::-1])):
        with pytest.raises(UnsupportedError, match="has no name in files; those of nf4, fp4, int4"):
            to_bitsandbytes(NAME, hb.quantize(weight((4, 4)), book))


def test_scales_and_zero_points_are_stored_alike() -> None:
    one = hb.quantize(weight((64, 64)), "int4_affine")
    mixed = type(one)(
        one.codes,
        one.scales,
        one.codebook,
        64,
        one.shape,
        one.dtype,
        double_quantize(one.zero_points),
    )
    with pytest.raises(UnsupportedError, match="scales and zero-points are quantized differently"):
        to_bitsandbytes(NAME, mixed)


Change = Callable[[dict[str, Tensor]], None]


def put(part: str, tensor: Tensor) -> Change:
    return lambda parts: parts.update({f"{NAME}{part}": tensor})


def drop(part: str) -> Change:
    def change(parts: dict[str, Tensor]) -> None:
        del parts[f"{NAME}{part}"]

    return change


NF4_STATE = ".quant_state.bitsandbytes__nf4"
TENSOR_FAULTS: dict[str, tuple[Change, str]] = {
    "no codes": (drop(""), "its codes are missing"),
    "codes too short": (put("", torch.zeros(8, 1).byte()), r"codes: uint8 \[2048, 1\] expected"),
    "codes flat": (put("", torch.zeros(2048).byte()), r"codes: .* found uint8 \[2048\]"),
    "codes of bool": (put("", torch.zeros(2048, 1).bool()), r"codes: .* found bool \[2048, 1\]"),
    "codes of int64": (put("", torch.zeros(256, 1).long()), r"codes: .* found int64 \[256, 1\]"),
    "no scales": (drop(".absmax"), "absmax: missing"),
    "float scales": (put(".absmax", torch.ones(64)), r"absmax: uint8 \[64\] expected, found fl"),
    "short scales": (put(".absmax", torch.ones(63).byte()), r"absmax: uint8 \[64\] expected"),
    "scales 2-D": (put(".absmax", torch.ones(64, 1).byte()), r"absmax: .* found uint8 \[64, 1\]"),
    "no map": (drop(".quant_map"), "quant_map: missing"),
    "other map": (put(".quant_map", torch.ones(16)), "quant_map: the values of nf4 expected"),
    "short map": (put(".quant_map", torch.ones(8)), r"quant_map: float32 \[16\] expected"),
    "map with a NaN": (put(".quant_map", torch.full((16,), torch.nan)), "quant_map holds 16 NaN"),
    "no nested scales": (drop(".nested_absmax"), "nested_absmax: missing"),
    "nested scale infinite": (
        put(".nested_absmax", torch.tensor([torch.inf])),
        r"nested_absmax holds 1 NaN or infinite values of 1; the first is inf at index \[0\]",
    ),
    "no nested map": (drop(".nested_quant_map"), "nested_quant_map: missing"),
    "zero-points": (put(".zero_points", torch.ones(64)), "zero_points: not expected by its state"),
}


@pytest.mark.parametrize("case", TENSOR_FAULTS)
def test_faulty_tensors(case: str) -> None:
    change, message = TENSOR_FAULTS[case]
    parts = to_bitsandbytes(NAME, hb.quantize(weight((64, 64))))
    change(parts)
    with pytest.raises(FormatError, match=f"{NAME} is not a 4-bit weight: 1 problem\n  {message}"):
        from_bitsandbytes(NAME, parts)


def test_all_faults_of_the_tensors_at_once() -> None:
    parts = to_bitsandbytes(NAME, hb.quantize(weight((64, 64)), double_quant=False))
    parts = {key: tensor for key, tensor in parts.items() if ".quant_state." in key}
    parts[f"{NAME}.nested_absmax"] = torch.ones(1)
    with pytest.raises(FormatError) as caught:
        from_bitsandbytes(NAME, parts)
    assert caught.value.problems == (
        "its codes are missing",
        "quant_map: missing",
        "absmax: missing",
        "nested_absmax: not expected by its state",
    )


def test_a_nan_in_plain_scales_is_named() -> None:
    parts = to_bitsandbytes(NAME, hb.quantize(weight((64, 64)), double_quant=False))
    parts[f"{NAME}.absmax"][17] = torch.nan
    with pytest.raises(
        FormatError, match=r"absmax holds 1 NaN .* the first is nan at index \[17\]"
    ):
        from_bitsandbytes(NAME, parts)


FIELD_FAULTS: list[tuple[str, object, str]] = [
    ("quant_type", "fp4", "quant_type: 'nf4' expected, found 'fp4'"),
    ("quant_type", None, "quant_type: 'nf4' expected, found None"),
    *(
        ("blocksize", value, "blocksize: a power of two from 32 to 4096 expected")
        for value in (0, -64, 65, 16, 8192, 64.0, "64", True, None, 2**80)
    ),
    *(
        ("dtype", value, "dtype: one of float32, bfloat16, float16 expected")
        for value in ("float64", "torch.float32", 32, None, ["float32"])
    ),
    *(
        ("shape", value, "shape: a list of at most 64 whole numbers and 2.60 elements expected")
        for value in (None, 4096, [64, -64], [64.0, 64], [True, 4096], [2**40, 2**40], [1] * 65)
    ),
    ("shape", [0, 2**61], "shape: a list"),
    ("nested_blocksize", 0, "nested_blocksize: a power of two"),
    ("nested_blocksize", 255, "nested_blocksize: a power of two"),
    ("nested_dtype", "bfloat16", "nested_dtype: 'float32' expected, found 'bfloat16'"),
    *(
        ("nested_offset", value, "nested_offset: a number within float32 expected")
        for value in ("0.1", None, True, 1e39, 10**400)
    ),
]


@pytest.mark.parametrize(("field", "value", "message"), FIELD_FAULTS)
def test_faulty_fields(field: str, value: object, message: str) -> None:
    parts = to_bitsandbytes(NAME, hb.quantize(weight((64, 64))))
    key, state = state_of(parts)
    parts[key] = pack(state | {field: value})
    with pytest.raises(FormatError, match=f"{key} does not describe a 4-bit weight.*\n  {message}"):
        from_bitsandbytes(NAME, parts)


def test_fields_are_all_there_and_no_others() -> None:
    parts = to_bitsandbytes(NAME, hb.quantize(weight((64, 64))))
    key, state = state_of(parts)
    del state["nested_offset"], state["shape"]
    parts[key] = pack(state | {"code": 1})
    with pytest.raises(FormatError) as caught:
        from_bitsandbytes(NAME, parts)
    assert caught.value.problems == (
        "nested_offset: missing",
        "shape: missing",
        "'code': not expected",
    )


def test_zero_points_have_an_offset_of_their_own() -> None:
    parts = to_bitsandbytes(NAME, hb.quantize(weight((64, 64)), "int4_affine"))
    key, state = state_of(parts)
    parts[key] = pack(state | {"nested_zero_points_offset": "x"})
    with pytest.raises(FormatError, match="nested_zero_points_offset: a number within float32"):
        from_bitsandbytes(NAME, parts)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.zeros(3), r"uint8 \[at most 9999\] expected, found float32 \[3\]"),
        (torch.zeros(3, 3).byte(), r"found uint8 \[3, 3\]"),
        (torch.zeros(10_000).byte(), r"found uint8 \[10000\]"),
        (torch.tensor(list(b"{")).byte(), "not JSON"),
        (torch.tensor(list(b"\xff")).byte(), "not UTF-8"),
        (torch.tensor(list(b"[]")).byte(), "a JSON object expected, found list"),
        (torch.tensor(list(b"[" * 9000)).byte(), "nested deeper than 64"),
        (torch.tensor(list(b'{"shape":1,"shape":2}')).byte(), "'shape' appears again"),
        (torch.tensor(list(b'{"nested_offset":NaN}')).byte(), "NaN is not a JSON number"),
    ],
)
def test_a_state_that_is_no_json_object(packed: Tensor, message: str) -> None:
    parts = to_bitsandbytes(NAME, hb.quantize(weight((64, 64))))
    key, _ = state_of(parts)
    parts[key] = packed
    with pytest.raises(FormatError, match=message):
        from_bitsandbytes(NAME, parts)


def test_a_weight_has_one_state() -> None:
    parts = to_bitsandbytes(NAME, hb.quantize(weight((64, 64))))
    packed = parts.pop(f"{NAME}{NF4_STATE}")
    with pytest.raises(FormatError, match=r"one part quant_state of .* expected, found 0"):
        from_bitsandbytes(NAME, parts)
    parts[f"{NAME}{NF4_STATE}"] = parts[f"{NAME}.quant_state.halfbyte__int4"] = packed
    with pytest.raises(FormatError, match="expected, found 2"):
        from_bitsandbytes(NAME, parts)


def test_names_of_a_checkpoint() -> None:
    a, b = "a.weight", "b.weight"
    names = [
        *to_bitsandbytes(a, hb.quantize(weight((64, 64)))),
        *to_bitsandbytes(b, hb.quantize(weight((64, 64)), "int4_affine")),
        "norm.weight",
        "b.bias",
    ]
    assert quantized_names(names) == {a, b}
    assert quantized_names(["norm.weight"]) == set()
    names.remove(f"{a}.quant_state.bitsandbytes__nf4")
    names.remove(b)
    names += [f"{b}.SCB", f"{b}.quant_state.bitsandbytes__int8", "c.absmax"]
    with pytest.raises(FormatError) as caught:
        quantized_names(names)
    text = str(caught.value)
    for problem in (
        "b.weight.quant_state.bitsandbytes__int8: a state of bitsandbytes__nf4 or ",
        "2 states for 1 weights: one each expected",
        "b.weight: its codes are missing",
        "a.weight.absmax: part of a 4-bit weight without a.weight.quant_state...",
        "a.weight.nested_absmax: part of",
        "b.weight.SCB: not a part of a 4-bit weight that is known",
        "c.absmax: part of a 4-bit weight without c.quant_state...",
    ):
        assert problem in text

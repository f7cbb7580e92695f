"""The vectors of docs/format.md, read out of the page and checked against the code."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.formats.bitsandbytes_layout import from_bitsandbytes, to_bitsandbytes
from halfbyte.formats.codebooks import DYNAMIC_MAP, NF4, find_codebook
from halfbyte.formats.double_quantization import DoubleQuantized
from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.storage.fingerprint import fingerprint_tensors
from halfbyte.storage.manifest import verify_manifest, write_manifest

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def fields(block: str) -> dict[str, str]:
    """Name -> value; a line that begins with a space continues the value above."""
    joined = re.sub(r"\n +", " ", block.strip())
    return dict(line.split(maxsplit=1) for line in joined.splitlines())


def unhex(text: str, dtype: torch.dtype) -> Tensor:
    raw = b""
    for word in text.split():
        digits, _, count = word.partition("*")
        raw += bytes.fromhex(digits) * int(count or 1)
    return torch.frombuffer(bytearray(raw), dtype=dtype)


VECTORS = [fields(block) for block in blocks("vector")]
QUANTIZED = [vector for vector in VECTORS if "codebook" in vector]


def test_the_page_has_all_its_vectors() -> None:
    assert len(QUANTIZED) == 7
    assert {vector["codebook"] for vector in QUANTIZED} == {"nf4", "fp4", "int4", "int4_affine"}
    assert len(VECTORS) == 9


@pytest.mark.parametrize("vector", QUANTIZED)
def test_encoding_and_decoding(vector: dict[str, str]) -> None:
    dtype = getattr(torch, vector["dtype"])
    x, book = unhex(vector["input"], dtype), find_codebook(vector["codebook"])
    codes = unhex(vector["codes"], torch.uint8)
    scales = unhex(vector["scales"], torch.float32)
    zero_points = None
    if "zero_points" in vector:
        zero_points = unhex(vector["zero_points"], torch.float32)
    block_size = int(vector["block_size"])
    q = hb.quantize(x, book, block_size=block_size, double_quant=False)
    assert torch.equal(q.codes, codes)
    assert torch.equal(q.scales, scales)
    assert (q.zero_points is None) == (zero_points is None)
    assert zero_points is None or torch.equal(q.zero_points, zero_points)
    read = QuantizedTensor(codes, scales, book, block_size, x.shape, dtype, zero_points)
    assert torch.equal(read.dequantize(), unhex(vector["output"], dtype))


def test_the_division_vector_tells_the_two_ways_apart() -> None:
    (vector,) = [v for v in QUANTIZED if v["codes"].startswith("f57")]
    codes = unhex(vector["codes"], torch.uint8)
    assert (codes[0], codes[16]) == (0xF5, 0xF4)
    x = unhex(vector["input"], torch.float32)
    assert torch.equal(x[:2], x[32:34])


def test_tables() -> None:
    (table,) = blocks("table")
    for name, text in fields(table).items():
        assert torch.equal(unhex(text, torch.float32), find_codebook(name).table())
    rows = re.findall(r"^\| (\d+) \| (\S+) \| (\S+) \| (\S+)/7 \| (\d+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 16
    for code, nf4, fp4, int4, affine in rows:
        i = int(code)
        assert float(nf4) == NF4.values[i]
        numerator, _, denominator = fp4.partition("/")
        expected = int(numerator) / int(denominator or 1) / 12
        assert find_codebook("fp4").values[i] == pytest.approx(expected, abs=1e-12)
        assert find_codebook("int4").values[i] == int(int4) / 7
        assert int(affine) == i


def test_double_quantization() -> None:
    (vector,) = [v for v in VECTORS if "nested_offset" in v]
    (offset,) = struct.unpack("<f", bytes.fromhex(vector["nested_offset"]))
    codes = unhex(vector["codes"], torch.uint8)
    nested = unhex(vector["nested_scales"], torch.float32)
    decoded = unhex(vector["decoded"], torch.float32)
    stored = hb.double_quantize(unhex(vector["scales"], torch.float32))
    assert torch.equal(stored.codes, codes)
    assert torch.equal(stored.scales, nested)
    assert stored.offset == offset
    assert torch.equal(DoubleQuantized(codes, nested, offset).dequantize(), decoded)


def test_names_and_json() -> None:
    (vector,) = [v for v in VECTORS if "w.absmax" in v]
    text = blocks("json")[0].strip()
    x = unhex(vector["weight"], torch.bfloat16).view(5, 7)
    parts = {
        "w": unhex(vector["w"], torch.uint8).view(-1, 1),
        "w.absmax": unhex(vector["w.absmax"], torch.uint8),
        "w.quant_map": NF4.table(),
        "w.nested_absmax": unhex(vector["w.nested_absmax"], torch.float32),
        "w.nested_quant_map": DYNAMIC_MAP.table(),
        "w.quant_state.bitsandbytes__nf4": torch.tensor(list(text.encode()), dtype=torch.uint8),
    }
    ours = to_bitsandbytes("w", hb.quantize(x, block_size=32))
    assert list(ours) == list(parts)
    for name, tensor in parts.items():
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(
        from_bitsandbytes("w", parts).dequantize(), hb.quantize(x, block_size=32).dequantize()
    )


def test_bits_an_element() -> None:
    assert f"{4 + 8 / 64 + 32 / (64 * 256):.3f}" == "4.127"
    assert "4 + 8/64 + 32/(64 * 256) = 4.127" in PAGE


def test_fingerprint() -> None:
    (text,) = blocks("fingerprint")
    tensors = {"a": torch.tensor(7, dtype=torch.uint8), "b": torch.tensor([[1.0, -2.0]])}
    assert fingerprint_tensors(tensors) == text.strip()


def test_manifest(tmp_path: Path) -> None:
    text = blocks("json")[1]
    (name,) = json.loads(text)["files"]
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(b"abc")
    write_manifest(tmp_path)
    assert (tmp_path / "MANIFEST.json").read_text() == text
    verify_manifest(tmp_path)

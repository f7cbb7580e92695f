"""GGUF files: what the library reads, and lies."""

import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_gguf as tiny
from halfbyte.errors import FormatError, MissingFileError, UnsafeArtifactError
from halfbyte.formats import gguf_header
from halfbyte.formats.gguf_file import CHUNK_ELEMENTS, GgufFile
from halfbyte.formats.gguf_header import MAX_ELEMENTS, SUPPORTED, parse_header

META = {
    "general.architecture": ("str", "llama"),
    "n": ("u32", 7),
    "f": ("f32", 0.5),
    "b": ("bool", True),
    "names": ("[str", ["a", "é"]),
    "ids": ("[i32", [1, -2]),
}
GOOD = tiny.build(META, [tiny.tensor("t", np.ones((2, 4))), tiny.tensor("u", np.zeros((3,)))])


def open_bytes(tmp_path: Path, content: bytes) -> GgufFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return GgufFile.open(path)


def test_metadata_and_tensors(tmp_path: Path) -> None:
    file = open_bytes(tmp_path, GOOD)
    assert file.metadata == {k: v for k, (_, v) in META.items()}
    assert file.read("t").tolist() == [[1.0] * 4] * 2
    assert file.read("u", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert file.get("n", int) == 7
    assert file.get("n", float) == 7.0
    assert file.get("none", str) is None
    assert file.get_list("names", str) == ["a", "é"]
    for key, kind in (("n", str), ("b", int), ("names", str), ("f", int)):
        with pytest.raises(FormatError, match=f"{key}: {kind.__name__} expected"):
            file.get(key, kind)
    with pytest.raises(FormatError, match="an array of int expected"):
        file.get_list("names", int)
    with pytest.raises(FormatError, match="an array expected"):
        file.get_list("n", int)
    with pytest.raises(FormatError, match="no tensor 'v' among 2"):
        file.read("v")


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_type_decodes_as_the_library_does(tmp_path: Path, name: str) -> None:
    kind = GGMLQuantizationType[name]
    # More than one chunk, and a last one that is not full.
    info = tiny.random_blocks("weight", kind, (CHUNK_ELEMENTS // 512 + 3, 768))
    file = open_bytes(tmp_path, tiny.build(META, [tiny.tensor("t", np.ones((2, 4))), info]))
    (theirs,) = [t for t in GGUFReader(file.path).tensors if t.name == "weight"]
    expected = dequantize(theirs.data, kind).reshape(info.shape)
    assert np.isfinite(expected).all()
    assert np.array_equal(file.read("weight").numpy(), expected)
    half = file.read("weight", dtype=torch.bfloat16)
    assert torch.equal(half, torch.from_numpy(expected.copy()).bfloat16())


def f32(name: str = "t", shape: tuple[int, ...] = (2, 4), **lies: int) -> tiny.Info:
    return tiny.Info(name, shape, 0, b"\0" * 32, **lies)


LIES = {
    "empty": (b"", "is empty"),
    "magic": (tiny.build(META, magic=b"GGML"), "magic: b'GGUF' expected"),
    "version-1": (tiny.build(META, version=1), "version: 2 or 3 expected, found 1"),
    "big-endian": (tiny.build(META, version=3 << 24), "a big-endian file"),
    "many-tensors": (tiny.build(META, num_tensors=1 << 60), "tensors: at most"),
    "many-pairs": (tiny.build(META, num_pairs=1 << 60), "metadata pairs: at most"),
    "one-pair-more": (tiny.build(META, num_pairs=len(META) + 9), "the file has"),
    "one-tensor-more": (tiny.build(META, [f32()], num_tensors=2), "dimensions expected|file has"),
    "long-key": (tiny.build({"k" * 70_000: ("u32", 1)}), "at most 65535 bytes"),
    "long-string": (
        tiny.build({"k": ("str", "x")}).replace(
            tiny.string("x"), struct.pack("<Q", 1 << 62) + b"x"
        ),
        "at most",
    ),
    "string-beyond-the-end": (
        tiny.build({"k": ("str", "x")}).replace(tiny.string("x"), struct.pack("<Q", 999) + b"x"),
        "999 bytes at",
    ),
    "array-length": (
        tiny.build({"k": ("[u8", [1, 2])}).replace(
            struct.pack("<IQ", 0, 2), struct.pack("<IQ", 0, 1 << 40)
        ),
        "an array of 1099511627776 elements",
    ),
    "array-of-arrays": (
        tiny.build({"k": ("[u8", [1, 2])}).replace(
            struct.pack("<IIQ", 9, 0, 2), struct.pack("<IIQ", 9, 9, 2)
        ),
        "array of arrays",
    ),
    "metadata-bomb": (
        tiny.build({f"k{i}": ("[u8", bytes(MAX_ELEMENTS // 2)) for i in range(3)}),
        "all arrays together",
    ),
    "value-type": (
        tiny.build({"k": ("u32", 1)}).replace(struct.pack("<II", 4, 1), struct.pack("<II", 99, 1)),
        "unknown type 99",
    ),
    "not-utf8": (tiny.build({"k": ("str", b"\xff")}), "not UTF-8"),
    "key-twice": (tiny.build([("k", ("u32", 1)), ("k", ("u32", 2))]), "'k': appears again"),
    "tensor-twice": (tiny.build(META, [f32(), f32()]), "'t': appears again"),
    "tensor-type": (tiny.build(META, [tiny.Info("t", (2, 4), 77, b"")]), "unknown type 77"),
    "unreadable-type": (
        tiny.build(META, [tiny.Info("t", (1, 256), GGMLQuantizationType.IQ2_XS, b"\0" * 74)]),
        "type IQ2_XS cannot be read",
    ),
    "no-dimensions": (tiny.build(META, [f32(shape=())]), "1 to 4 dimensions expected, found 0"),
    "five-dimensions": (tiny.build(META, [f32(shape=(1,) * 5)]), "found 5"),
    "no-elements": (tiny.build(META, [f32(shape=(0, 4))]), "has no elements"),
    "overflowing-shape": (tiny.build(META, [f32(shape=(1 << 62, 1 << 62))]), "bytes at"),
    "cut-rows": (
        tiny.build(META, [tiny.Info("t", (2, 33), GGMLQuantizationType.Q8_0, b"\0" * 64)]),
        "rows of a multiple of 32 elements",
    ),
    "beyond-the-end": (tiny.build(META, [f32(offset=1 << 40)]), "the file has"),
    "misaligned": (tiny.build(META, [f32(offset=4)]), "is not a multiple of 32"),
    "overlap": (tiny.build(META, [f32("t"), f32("u", offset=0)]), "'u': overlaps 't'"),
    "alignment": (tiny.build({"general.alignment": ("u32", 3)}), "a power of two"),
    "no-alignment": (tiny.build({"general.alignment": ("u32", 0)}), "a power of two"),
    "alignment-text": (tiny.build({"general.alignment": ("str", "x")}), "a power of two"),
    "truncated": (GOOD[:-40], "the file has"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused_without_allocating(tmp_path: Path, name: str) -> None:
    content, message = LIES[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=message):
        open_bytes(tmp_path, content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10


def test_all_faults_of_the_tensors_are_listed(tmp_path: Path) -> None:
    infos = [f32(f"t{i}", offset=4 + i) for i in range(30)]
    with pytest.raises(FormatError, match=r"21 problems[^$]*and 9 more"):
        open_bytes(tmp_path, tiny.build(META, infos))


@settings(max_examples=300, deadline=None)
@given(cut=st.integers(0, len(GOOD)), at=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255))
def test_damage_anywhere_is_a_problem_or_harmless(cut: int, at: int, byte: int) -> None:
    damaged = bytearray(GOOD)
    damaged[at] = byte
    for content in (bytes(damaged), GOOD[:cut]):
        header = parse_header(memoryview(content))
        for entry in header.entries.values():
            assert 0 <= entry.begin <= entry.end <= len(content)


def test_only_regular_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        GgufFile.open(tmp_path / "none.gguf")
    with pytest.raises(UnsafeArtifactError):
        GgufFile.open(tmp_path)


def test_a_forgotten_tensor_can_be_read_again(tmp_path: Path) -> None:
    file = open_bytes(tmp_path, GOOD)
    before = file.read("t")
    file.forget("t")
    assert torch.equal(file.read("t"), before)


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    assert open_bytes(tmp_path, GOOD).get_list("none", str) is None


def test_metadata_is_bounded_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_METADATA_BYTES", 64)
    with pytest.raises(FormatError, match="metadata: at most 64 bytes expected"):
        open_bytes(tmp_path, GOOD)

"""Hostile files: each refused within a second, in bounded memory, by a message naming its fault."""

import json
import os
import re
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from halfbyte.errors import FormatError, HalfbyteError, StorageError, UnsafeArtifactError
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.formats.shards import open_shards

INDEX = "model.safetensors.index.json"


def packed(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def one(data: bytes = bytes(8), **changes: Any) -> bytes:
    return packed(json.dumps({"t": entry(**changes)}).encode(), data)


def many(*ranges: tuple[int, int], size: int = 16) -> bytes:
    header = {
        f"t{i}": entry(dtype="U8", shape=[end - begin], data_offsets=[begin, end])
        for i, (begin, end) in enumerate(ranges)
    }
    return packed(json.dumps(header).encode(), bytes(size))


def field(text: str) -> bytes:
    """One entry whose JSON is given as text."""
    return packed(f'{{"t":{text}}}'.encode(), bytes(8))


VALID = one()
NUM_ENTRIES = 50_001

FILES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    # The length before the header.
    "empty": (b"", "at least 10 bytes expected, found 0"),
    "only a length": (struct.pack("<Q", 2), "at least 10 bytes expected, found 8"),
    "length of the whole address space": (
        packed(b"{}", length=2**64 - 1),
        "header: at most 100000000 bytes expected, the file claims 18446744073709551615",
    ),
    "negative length": (packed(b"{}", length=2**63), "the file claims 9223372036854775808"),
    "length of a gigabyte": (packed(b"{}", length=2**30), "at most 100000000 bytes expected"),
    "length beyond the file": (packed(b"{}", length=3), "header: 3 bytes claimed, 2 follow"),
    "length of the limit in a small file": (
        packed(b"{}", length=100_000_000),
        "header: 100000000 bytes claimed, 2 follow in the file",
    ),
    "length 0": (packed(b"", b"{}"), "header: at least 2 bytes expected, the file claims 0"),
    "length too short": (
        packed(b'{"t":' + json.dumps(entry()).encode() + b"}", bytes(8), length=20),
        "header: 't': an object of dtype, shape and data_offsets",
    ),
    "a pickle": (b"\x80\x04\x95" + bytes(40), "header: 9766016 bytes claimed, 35 follow"),
    # JSON.
    "zeros": (packed(bytes(64)), r"header: '{' expected as its first byte, found b'\\x00'"),
    "an array": (packed(b'["t"]'), r"header: '{' expected as its first byte, found b'\['"),
    "a byte order mark": (packed(b"\xef\xbb\xbf{}"), "'{' expected as its first byte"),
    "UTF-16": (packed('{"t":1}'.encode("utf-16")), "'{' expected as its first byte"),
    "spaces first": (packed(b"  {}"), "'{' expected as its first byte, found b' '"),
    "a name that is not UTF-8": (
        packed(b'{"\xff\xfe":' + json.dumps(entry()).encode() + b"}", bytes(8)),
        "header: UTF-8 expected at byte 1",
    ),
    "a name of half a surrogate": (
        packed(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", bytes(8)),
        "header: UTF-8 expected at byte 1",
    ),
    "a bad escape in a name": (packed(b'{"\\q":{}}'), "a JSON string expected at byte 1"),
    "a name that never ends": (packed(b'{"tttttt'), "a name and ':' expected at byte 1"),
    "backslashes without end": (
        lambda: packed(b'{"' + b"\\" * 5_000_001),
        "a name and ':' expected at byte 1",
    ),
    "a control character in a name": (packed(b'{"a\nb":{}}'), "a name and ':' expected at byte 1"),
    "a number for a name": (packed(b"{1:{}}"), "a name and ':' expected at byte 1, found b'1:"),
    "cut off after a name": (packed(b'{"t":'), "expected at byte 5, found its end"),
    "cut off after an entry": (
        packed(b'{"t":' + json.dumps(entry()).encode(), bytes(8)),
        "',' or '}' expected at byte 59, found its end",
    ),
    "a comma at the end": (
        packed(b'{"t":' + json.dumps(entry()).encode() + b",}", bytes(8)),
        "a name and ':' expected at byte 60, found b'}'",
    ),
    "text after the header": (packed(b"{} x"), "nothing but spaces after the object expected"),
    "nested objects": (
        lambda: packed(b'{"t":' * 1_000_000),
        "an object of dtype, shape and data_offsets, without nesting",
    ),
    "nested arrays": (lambda: packed(b'{"t":' + b"[" * 5_000_000), "without nesting"),
    "nested arrays in a shape": (
        lambda: field('{"dtype":"F32","shape":' + "[" * 900 + "]" * 900 + "}"),
        "without nesting",
    ),
    "nested metadata": (
        lambda: packed(b'{"__metadata__":{"a":' + b"[" * 5_000_000),
        "__metadata__: 'a': a text expected",
    ),
    "an entry of megabytes": (
        lambda: field('{"shape":[' + "1," * 2_000_000 + "1]}"),
        "of at most 4096 bytes",
    ),
    "an entry that is no JSON": (field('{"dtype" "F32"}'), "'t': not JSON: Expecting ':'"),
    "a number of thousands of digits": (field('{"shape":' + "[" + "9" * 4000 + "]}"), "'t': dtype"),
    # Names.
    "a name twice": (
        packed(f'{{"t":{json.dumps(entry())},"t":{json.dumps(entry())}}}'.encode(), bytes(8)),
        "'t': appears more than once",
    ),
    "metadata twice": (
        packed(b'{"__metadata__":{},"__metadata__":{}}'),
        "'__metadata__': appears more than once",
    ),
    "a text of metadata twice": (
        packed(b'{"__metadata__":{"a":"1","a":"2"}}'),
        "__metadata__: 'a' appears more than once",
    ),
    "metadata that is no text": (packed(b'{"__metadata__":{"a":1}}'), "'a': a text expected"),
    "metadata that is no object": (packed(b'{"__metadata__":null}'), "an object of texts expected"),
    "metadata cut off": (packed(b'{"__metadata__":{"a":"1"'), "',' or '}' expected at byte 24"),
    "too many tensors": (
        lambda: packed(
            b"{"
            + b",".join(
                b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i
                for i in range(NUM_ENTRIES)
            )
            + b"}"
        ),
        "more than 50000 tensors",
    ),
    "too many texts": (
        lambda: packed(
            b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(NUM_ENTRIES)) + b"}}"
        ),
        "__metadata__: more than 50000 texts",
    ),
    "too many tensors in disguise": (
        lambda: packed(
            b"{"
            + b",".join(
                b'"%d":{"dtype":"U8","shape":[0],"data_offset\\u0073":[0,0]}' % i
                for i in range(NUM_ENTRIES)
            )
            + b"}"
        ),
        "more than 50000 tensors",
    ),
    # Entries.
    "an empty entry": (
        field("{}"),
        "'t': dtype, shape and data_offsets, once each, expected; noth",
    ),
    "an entry without a dtype": (
        field('{"shape":[2],"data_offsets":[0,8]}'),
        "once each, expected; 'shape', 'data_offsets' found",
    ),
    "an entry with more": (one(device="cuda"), "'data_offsets', 'device' found"),
    "a field twice": (
        field('{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}'),
        "'t': dtype, shape and data_offsets, once each, expected",
    ),
    "an unknown dtype": (one(dtype="Q4_K"), "'t': dtype: one of BOOL, .* expected, found 'Q4_K'"),
    "a dtype below a byte": (one(dtype="F4"), "found 'F4'"),
    "a dtype in lower case": (one(dtype="f32"), "found 'f32'"),
    "a dtype that is a number": (one(dtype=7), "dtype: .* found 7"),
    "a negative size": (one(shape=[-2]), r"shape: .* expected, found \[-2\]"),
    "two negative sizes": (one(shape=[-2, -1]), r"shape: .* expected, found \[-2, -1\]"),
    "a size that is a float": (one(shape=[2.0]), r"shape: .* expected, found \[2.0\]"),
    "a size that is a bool": (one(shape=[True, 2]), r"shape: .* expected, found \[True, 2\]"),
    "a size that is a text": (one(shape=["2"]), r"shape: .* expected, found \['2'\]"),
    "a size beyond 64 bits": (one(shape=[2**64 + 2]), r"shape: .* found \[18446744073709551618\]"),
    "a shape that overflows to fit": (
        one(shape=[2**33, 2**31 + 1]),
        "needs more than 2.63 - 1 byt",
    ),
    "a zero that hides an overflow": (
        one(b"", shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
        "needs more than 2.63 - 1 bytes",
    ),
    "a shape that is a number": (one(shape=2), "shape: .* expected, found 2"),
    "a shape of many dimensions": (one(shape=[1] * 64 + [2]), "shape: a list of at most 64 whole"),
    "a wrong size": (one(shape=[3]), "12 bytes expected for its dtype and shape, found 8"),
    "a wrong dtype": (one(dtype="F64"), "16 bytes expected for its dtype and shape, found 8"),
    "negative offsets": (one(data_offsets=[-8, 0]), r"data_offsets: .* found \[-8, 0\]"),
    "offsets that are floats": (one(data_offsets=[0.0, 8.0]), r"found \[0.0, 8.0\]"),
    "offsets that are bools": (one(shape=[], data_offsets=[False, 4]), r"found \[False, 4\]"),
    "offsets the wrong way round": (one(data_offsets=[8, 0]), r"begin <= end, .* found \[8, 0\]"),
    "one offset": (one(data_offsets=[8]), r"data_offsets: .* found \[8\]"),
    "three offsets": (one(data_offsets=[0, 4, 8]), r"data_offsets: .* found \[0, 4, 8\]"),
    "offsets of no list": (one(data_offsets="0,8"), "data_offsets: .* found '0,8'"),
    "offsets beyond 64 bits": (one(data_offsets=[2**70, 2**70 + 8]), "data_offsets: .* found"),
    "offsets beyond the file": (one(data_offsets=[8, 16]), "end 16 is beyond the 8 bytes of data"),
    # The data.
    "an overlap": (many((0, 10), (8, 16)), "'t1': overlaps 't0' by 2 bytes"),
    "the same bytes twice": (many((0, 16), (0, 16)), "'t1': overlaps 't0' by 16 bytes"),
    "a tensor within another": (many((0, 16), (4, 8)), "'t1': overlaps 't0' by 12 bytes"),
    "an empty tensor within another": (many((0, 16), (4, 4)), "'t1': overlaps 't0' by 12 bytes"),
    "a hole": (many((0, 6), (8, 16)), "'t1': a hole of 2 bytes after 't0'"),
    "a hole at the start": (many((4, 16)), "'t0': a hole of 4 bytes after the header"),
    "bytes at the end": (many((0, 8)), "8 bytes follow the last tensor"),
    "bytes and no tensor": (packed(b"{}", b"x"), "1 bytes follow the last tensor"),
    "cut off in the data": (VALID[:-1], "'t': data_offsets: end 8 is beyond the 7 bytes of data"),
}
"""Content -> what the message says of it."""


def refused(
    path: Path, opened: Path, kind: type[HalfbyteError], open_it: Callable[..., Any]
) -> str:
    """The message of a refusal: within a second, in memory bounded by the file's own size."""
    began = time.process_time()  # not the clock: others may be using the machine
    with pytest.raises(kind) as caught:
        open_it(opened)
    if sys.gettrace() is None:  # measuring coverage takes many times as long
        assert time.process_time() - began < 1
    size = path.stat().st_size if path.is_file() else 0
    tracemalloc.start()
    with pytest.raises(kind):
        open_it(opened)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Python's objects take several times the bytes that they are read from.
    assert peak < 12 * size + 500_000
    message = str(caught.value)
    assert len(message) < 3000
    return message


@pytest.mark.parametrize("case", FILES)
def test_hostile_files(tmp_path: Path, case: str) -> None:
    content, fault = FILES[case]
    path = tmp_path / "evil.safetensors"
    path.write_bytes(content() if callable(content) else content)
    message = refused(path, path, FormatError, SafetensorsFile.open)
    assert message.startswith(f"{path} is not a valid safetensors file: ")
    assert re.search(fault, message)


ACCEPTED_BY_THE_LIBRARY = {
    "a name twice",
    "a shape of many dimensions",
    "a text of metadata twice",
    "a zero that hides an overflow",
    "an entry with more",
    "metadata that is no object",
    "spaces first",
    "too many tensors",
    "too many tensors in disguise",
    "too many texts",
}
"""Refused here for what they leave undefined or would cost."""


@pytest.mark.parametrize("case", FILES)
def test_what_the_library_refuses_is_refused_here(tmp_path: Path, case: str) -> None:
    content, _ = FILES[case]
    path = tmp_path / "evil.safetensors"
    path.write_bytes(content() if callable(content) else content)
    try:
        with safe_open(path, "pt"):
            accepted = True
    except (SafetensorError, OSError):
        accepted = False
    assert accepted == (case in ACCEPTED_BY_THE_LIBRARY)


def test_truncated_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    write_safetensors(path, {"a": torch.ones(3), "b": torch.ones(2).bool()}, {"k": "v"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"whole.safetensors is not a valid safetensors file"):
            SafetensorsFile.open(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(FormatError, match="1 bytes follow the last tensor"):
        SafetensorsFile.open(path)


def test_every_flipped_byte_of_a_header_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "flipped.safetensors"
    write_safetensors(path, {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.uint8)}, {"k": "v"})
    whole = path.read_bytes()
    for position in range(len(whole) - 14):
        for bit in (0, 1, 5, 7):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                file = SafetensorsFile.open(path)
            except FormatError:
                continue
            for name in file.entries:  # a changed name, text, dtype or shape of the same size
                assert file.read(name).numel() * file.entries[name].dtype.itemsize < 14


def test_a_hundred_problems_are_counted_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    header = {f"t{i}": entry(dtype="?") for i in range(100)}
    path.write_bytes(packed(json.dumps(header).encode(), bytes(8)))
    with pytest.raises(FormatError) as caught:
        SafetensorsFile.open(path)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "and 80 more"


def test_all_problems_of_all_entries_at_once(tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    header = {"a": entry(dtype="X", shape=[-1]), "b": entry(data_offsets=[3, 1]), "c": entry()}
    path.write_bytes(packed(json.dumps(header).encode(), bytes(8)))
    with pytest.raises(FormatError) as caught:
        SafetensorsFile.open(path)
    assert [problem[:9] for problem in caught.value.problems] == [
        "'a': dtyp",
        "'a': shap",
        "'b': data",
    ]


# What is not even a file of the directory.


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def process_file(path: Path) -> None:
    path.symlink_to("/proc/self/environ")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


SHARDS = {
    fifo: (UnsafeArtifactError, "a regular file expected, found a FIFO"),
    Path.mkdir: (UnsafeArtifactError, "a regular file expected, found a directory"),
    zeros: (UnsafeArtifactError, "a regular file expected, found a character device"),
    loop: (StorageError, "cannot be opened: Too many levels of symbolic links"),
    process_file: (FormatError, "at least 10 bytes expected, found 0"),
    dangling: (HalfbyteError, "no such file|missing from the directory"),
}


@pytest.mark.parametrize("make", SHARDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("indexed", [False, True])
def test_hostile_kinds_of_shards(
    tmp_path: Path, make: Callable[[Path], object], indexed: bool
) -> None:
    kind, fault = SHARDS[make]
    path = tmp_path / ("evil.safetensors" if indexed else "model.safetensors")
    make(path)
    if indexed:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"t": path.name}}))
    message = refused(path, tmp_path, kind, open_shards)
    assert path.name in message
    assert re.search(fault, message)


INDICES: dict[str, tuple[str, type[HalfbyteError], str]] = {
    "upwards": ('{"weight_map":{"t":"../x.safetensors"}}', UnsafeArtifactError, "../x.safe"),
    "absolute": ('{"weight_map":{"t":"/x.safetensors"}}', UnsafeArtifactError, "/x.safe"),
    "deep": ('{"weight_map":' + "[" * 100_000, FormatError, "nested deeper than 64"),
    "deep objects": ('{"weight_map":' * 100_000, FormatError, "nested deeper than 64"),
    "twice": ('{"weight_map":{"t":"x","t":"y"}}', FormatError, "'t' appears again"),
    "not JSON": ("{", FormatError, "not JSON"),
    "empty": ("", FormatError, "not JSON"),
    "many": ('{"weight_map":{' + '"":"",' * 1_100_000 + "}}", FormatError, "at most 1048576"),
    "NaN": ('{"weight_map":NaN}', FormatError, "NaN is not a JSON number"),
}


@pytest.mark.parametrize("case", INDICES)
def test_hostile_indices(tmp_path: Path, case: str) -> None:
    text, kind, fault = INDICES[case]
    path = tmp_path / INDEX
    path.write_text(text)
    message = refused(path, tmp_path, kind, open_shards)
    assert str(path) in message
    assert fault in message


def test_an_index_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / INDEX
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no disk: it is one hole
    with pytest.raises(FormatError, match="at most 67108864 bytes of JSON expected"):
        open_shards(tmp_path)


def test_a_terabyte_of_nothing_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    for length, fault in ((100_000_000, "'{' expected as its first byte"), (2**39, "at most")):
        with path.open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(2**40)
        tracemalloc.start()
        with pytest.raises(FormatError, match=fault):
            SafetensorsFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < 500_000
        tracemalloc.stop()

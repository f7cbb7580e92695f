"""Opening and parsing what others wrote."""

import os
import socket
import stat
from pathlib import Path

import pytest

from halfbyte.errors import FormatError, MissingFileError, StorageError, UnsafeArtifactError
from halfbyte.storage import files
from halfbyte.storage.files import open_regular, read_exactly, read_into
from halfbyte.storage.json_file import MAX_VALUES, parse_json_object, read_json_object


def test_regular_files_and_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "l").symlink_to("f")
    for name in ("f", "l"):
        with open_regular(tmp_path / name) as (descriptor, status):
            assert status.st_size == 3
            assert read_exactly(descriptor, 2, 1, tmp_path) == b"bc"
            buffer = bytearray(3)
            read_into(descriptor, memoryview(buffer), 0, tmp_path)
            assert buffer == b"abc"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    with open_regular(tmp_path / "f") as (descriptor, _):
        with pytest.raises(FormatError, match=r"f: ends at byte 3, 2 more bytes were expected"):
            read_exactly(descriptor, 4, 1, tmp_path / "f")
        with pytest.raises(FormatError, match=r"ends at byte 3, 6 more bytes .*\nSomething trunc"):
            read_into(descriptor, memoryview(bytearray(9)), 0, tmp_path / "f")


def test_everything_else_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for path, kind in {
        tmp_path: "a directory",
        tmp_path / "fifo": "a FIFO",
        tmp_path / "socket": "a socket",
        Path("/dev/zero"): "a character device",
    }.items():
        with (
            pytest.raises(UnsafeArtifactError, match=f"a regular file expected, found {kind}"),
            open_regular(path),
        ):
            pass
    with (
        pytest.raises(MissingFileError, match="gone: no such file"),
        open_regular(tmp_path / "gone"),
    ):
        pass
    with (
        pytest.raises(StorageError, match="loop: cannot be opened"),
        open_regular(tmp_path / "loop"),
    ):
        pass


def test_a_file_exchanged_for_a_fifo_between_look_and_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "f").write_bytes(b"")
    regular = (tmp_path / "f").stat()
    monkeypatch.setattr(files.os, "stat", lambda path: regular)
    with pytest.raises(UnsafeArtifactError, match="found a FIFO"), open_regular(tmp_path / "fifo"):
        pass


def test_an_unknown_kind_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"")
    values = list((tmp_path / "f").stat())
    values[stat.ST_MODE] = 0o050000
    odd = os.stat_result(values)
    monkeypatch.setattr(files.os, "stat", lambda path: odd)
    with pytest.raises(UnsafeArtifactError, match="something else"), open_regular(tmp_path / "f"):
        pass


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, {"b": "ä"}]}')
    assert read_json_object(path) == {"a": [1, {"b": "ä"}]}
    with pytest.raises(FormatError, match=r"x.json: at most 5 bytes of JSON expected, found 23"):
        read_json_object(path, max_bytes=5)


def test_brackets_in_texts_are_not_nesting() -> None:
    text = '{"a": "' + "[{" * 200 + '\\"[[", "b": "\\\\", "c": [' + "[],[[]]," * 200 + "0]}"
    assert len(parse_json_object(text.encode(), "x")["c"]) == 401


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": 1, "a": 2}', "once in an object: 1 problem\n  'a' appears again"),
        (b'{"x": {"a": 1, "b": 2, "a": 2}}', "in an object: 1 problem\n  'a' appears again"),
        (b'{"a": Infinity}', "not JSON: Infinity is not a JSON number"),
        (b'{"a": NaN}', "not JSON: NaN is not a JSON number"),
        (b'{"a": \xff}', "not UTF-8: invalid start byte at byte 6"),
        (b'{"a": 1', "not JSON: Expecting ',' delimiter"),
        (b"", "not JSON"),
        (b"[1]", "a JSON object expected, found list"),
        (b'{"a":' + b"[" * 100_000, "nested deeper than 64 at byte 68"),
        (b'{"a":' * 1000, "nested deeper than 64"),
        (b'{"a": [' + b"0," * (MAX_VALUES + 1) + b"0]}", "at most 1048576 values expected"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"a": "' + b"\\" * 1_000_000, "not JSON"),
    ],
)
def test_json_that_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=f"^source: .*{message}"):
        parse_json_object(raw, "source")

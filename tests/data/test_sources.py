"""Finding files, their order, and reading them compressed."""

import gzip
from pathlib import Path

import pytest
import zstandard

from halfbyte.data.sources import DamagedFileError, Kind, find_sources, open_bytes
from halfbyte.errors import DataError, MissingFileError, StorageError

TEXT = "".join(f"line {number}\n" for number in range(20_000)).encode()


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", Kind.JSONL),
        ("a.ndjson", Kind.JSONL),
        ("a.JSON", Kind.JSON),
        ("a.csv.gz", Kind.CSV),
        ("a.tsv.zst", Kind.TSV),
        ("a.b.parquet", Kind.PARQUET),
        ("a.txt.GZ", Kind.TEXT),
    ],
)
def test_kind_is_in_the_suffix(tmp_path: Path, name: str, kind: Kind) -> None:
    make(tmp_path, name)
    (file,) = find_sources(tmp_path / name).files
    assert (file.kind, file.name) == (kind, name)


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    make(
        tmp_path, "b.jsonl", "a/2.jsonl", "a/10.jsonl", ".git/x.jsonl", ".hidden.jsonl", "README.md"
    )
    sources = find_sources(tmp_path)
    assert [file.name for file in sources.files] == ["a/10.jsonl", "a/2.jsonl", "b.jsonl"]
    assert sources.ignored == ("README.md",)


def test_glob(tmp_path: Path) -> None:
    make(tmp_path, "b.jsonl", "a.jsonl", "a.txt")
    files = find_sources(f"{tmp_path}/*.jsonl").files
    assert [file.path.name for file in files] == ["a.jsonl", "b.jsonl"]


def test_a_file_with_glob_characters_in_its_name_is_a_file(tmp_path: Path) -> None:
    make(tmp_path, "a[1].jsonl")
    assert len(find_sources(tmp_path / "a[1].jsonl").files) == 1


@pytest.mark.parametrize("location", ["nothing.jsonl", "*.jsonl", "empty"])
def test_nothing_there(tmp_path: Path, location: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"no such file|matches no file|no data file"):
        find_sources(tmp_path / location)


def test_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    make(tmp_path, "data.xlsx")
    with pytest.raises(DataError, match=r"data.xlsx(.|\n)*\.jsonl, .*\.gz or \.zst"):
        find_sources(tmp_path / "data.xlsx")


def test_several_kinds_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "b.csv", "c.jsonl")
    with pytest.raises(DataError) as caught:
        find_sources(tmp_path)
    assert caught.value.problems == ("a.jsonl: JSON lines", "b.csv: CSV")


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    (file,) = find_sources(tmp_path / "a.jsonl").files
    file.path.unlink()
    with (
        pytest.raises(StorageError, match=r"a\.jsonl: cannot be opened: No such file"),
        open_bytes(file),
    ):
        pass


def compressed(suffix: str, content: bytes) -> bytes:
    return gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)


def read(path: Path) -> bytes:
    (file,) = find_sources(path).files
    with open_bytes(file) as stream:
        return b"".join(stream)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_read_the_same(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compressed(suffix, TEXT))
    assert read(path) == TEXT
    path.write_bytes(compressed(suffix, TEXT) + compressed(suffix, b"another frame"))
    assert read(path) == TEXT + b"another frame"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_file_is_never_taken_for_a_short_one(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    whole = compressed(suffix, TEXT)
    for end in range(1, len(whole), len(whole) // 50):
        path.write_bytes(whole[:end])
        with pytest.raises(DamagedFileError, match="damaged compressed file"):
            read(path)
    path.write_bytes(whole + b"rubbish")
    with pytest.raises(DamagedFileError):
        read(path)

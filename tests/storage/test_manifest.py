"""Manifests list every fault of a directory."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from halfbyte.errors import FormatError, MissingFileError, UnsafeArtifactError, VerificationError
from halfbyte.storage.manifest import MANIFEST, sha256_file, verify_manifest, write_manifest


def make(directory: Path) -> None:
    (directory / "sub").mkdir()
    (directory / "a").write_bytes(b"aaa")
    (directory / "sub" / "b").write_bytes(bytes(3_000_000))
    (directory / "c").write_bytes(b"")
    write_manifest(directory)


def test_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(256)) * 10_000)
    expected = hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    assert sha256_file(tmp_path / "x") == expected


def test_contents(tmp_path: Path) -> None:
    make(tmp_path)
    verify_manifest(tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text()) == {
        "version": 1,
        "files": {
            "a": {"bytes": 3, "sha256": hashlib.sha256(b"aaa").hexdigest()},
            "c": {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()},
            "sub/b": {"bytes": 3_000_000, "sha256": hashlib.sha256(bytes(3_000_000)).hexdigest()},
        },
    }


def test_all_faults_at_once(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "a").write_bytes(b"aab")
    (tmp_path / "c").unlink()
    os.truncate(tmp_path / "sub" / "b", 5)
    (tmp_path / "d").write_bytes(b"new")
    with pytest.raises(VerificationError) as caught:
        verify_manifest(tmp_path)
    old, new = hashlib.sha256(b"aaa").hexdigest(), hashlib.sha256(b"aab").hexdigest()
    assert caught.value.problems == (
        "d: not in the manifest",
        f"a: sha256 {old} expected, found {new}",
        "c: missing",
        "sub/b: 3000000 bytes expected, found 5",
    )


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"MANIFEST.json: no such file"):
        verify_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 2, "files": {}}, "version 1 and an object of files expected, found version 2"),
        ({"version": 1}, "version 1 and an object of files expected"),
        ({"version": 1, "files": {"a": 3}}, "'a': bytes and sha256 expected, found 3"),
        ({"version": 1, "files": {"a": {"bytes": "3", "sha256": "x"}}}, "'a': bytes and sha256"),
        ({"version": 1, "files": {"a": {"bytes": 3}}}, "'a': bytes and sha256 expected"),
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(FormatError, match=message):
        verify_manifest(tmp_path)


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace("  ", "\t", 1))
    with pytest.raises(FormatError, match="is not as it was written: it is damaged or was edited"):
        verify_manifest(tmp_path)


def test_names_in_a_manifest_never_leave_the_directory(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    inside = tmp_path / "inside"
    inside.mkdir()
    files = {"../secret": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    (inside / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=2) + "\n")
    with pytest.raises(VerificationError, match=r"\.\./secret: missing"):
        verify_manifest(inside)


@pytest.mark.parametrize("kind", ["link", "fifo", "link to a directory"])
def test_only_regular_files(tmp_path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(tmp_path / "x")
    else:
        (tmp_path / "x").symlink_to("/etc/passwd" if kind == "link" else "/etc")
    with pytest.raises(UnsafeArtifactError, match="x: a regular file or a directory expected"):
        write_manifest(tmp_path)

"""A list of a directory's files with sizes and hashes, by which it can be checked later."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from halfbyte.errors import FormatError, UnsafeArtifactError, VerificationError
from halfbyte.storage.atomic import write_file
from halfbyte.storage.files import open_regular
from halfbyte.storage.json_file import read_json_object

MANIFEST = "MANIFEST.json"
VERSION = 1
_CHUNK = 1 << 20


def sha256_file(path: Path | str) -> str:
    """The hash of a regular file's bytes, in hexadecimal.

    Raises:
        MissingFileError, UnsafeArtifactError, StorageError: See `open_regular`.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with open_regular(Path(path)) as (descriptor, _):
        while count := os.readv(descriptor, [buffer]):
            digest.update(buffer[:count])
    return digest.hexdigest()


def write_manifest(directory: Path | str) -> None:
    """Write `MANIFEST.json` over all files below `directory`: the last file to be written.

    Raises:
        UnsafeArtifactError: Something in it is not a regular file.
    """
    directory = Path(directory)
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)}
        for name in _names(directory)
    }
    content = {"version": VERSION, "files": files}
    write_file(directory / MANIFEST, _serialized(content))


def verify_manifest(directory: Path | str) -> None:
    """Check every file below `directory` against its `MANIFEST.json`, and that there are no others.

    Raises:
        MissingFileError: There is no manifest: the directory was never completed.
        FormatError: The manifest is not one of ours.
        VerificationError: A file is missing, not listed, of another size or of other bytes; all are
            listed.
    """
    directory = Path(directory)
    listed = _read(directory / MANIFEST)
    present = set(_names(directory))
    problems = [f"{name}: not in the manifest" for name in sorted(present - set(listed))]
    for name, (size, sha256) in sorted(listed.items()):
        if name not in present:
            problems.append(f"{name}: missing")
            continue
        found = (directory / name).stat().st_size
        if found != size:
            problems.append(f"{name}: {size} bytes expected, found {found}")
        elif (digest := sha256_file(directory / name)) != sha256:
            problems.append(f"{name}: sha256 {sha256} expected, found {digest}")
    if problems:
        raise VerificationError(
            f"{directory} is not as it was written",
            problems=problems,
            hint="It is damaged or was edited: use another copy.",
        )


def _names(directory: Path) -> list[str]:
    """Files below a directory, but for the manifest, as paths relative to it with slashes."""
    names = []
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise UnsafeArtifactError(f"{path}: a regular file or a directory expected")
        names += [str(Path(folder, name).relative_to(directory)) for name in files]
    return sorted(name for name in names if name != MANIFEST)


def _read(path: Path) -> dict[str, tuple[int, str]]:
    content = read_json_object(path)
    files = content.get("files")
    if content.get("version") != VERSION or not isinstance(files, dict):
        raise FormatError(
            f"{path}: version {VERSION} and an object of files expected, "
            f"found version {content.get('version')!r:.60}"
        )
    listed, problems = {}, []
    for name, fields in files.items():
        match fields:
            case {"bytes": int(size), "sha256": str(sha256)} if len(fields) == 2:  # noqa: PLR2004
                listed[name] = (size, sha256)
            case _:
                problems.append(f"{name!r:.60}: bytes and sha256 expected, found {fields!r:.60}")
    if problems:
        raise FormatError(f"{path} is not a manifest", problems=problems)
    if path.read_bytes() != _serialized(content):  # nothing else checks the manifest's own bytes
        raise FormatError(f"{path} is not as it was written: it is damaged or was edited")
    return listed


def _serialized(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()

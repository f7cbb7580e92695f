"""Back from a merged model to its base: found by its record and checked, never subtracted.

Subtracting the update from rounded weights gives other weights, and requantizing them others still.
The base is where it was; what a merge notes of it is its path and the fingerprint of its tensors.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import FormatError, MissingFileError, VerificationError
from halfbyte.formats.shards import open_shards
from halfbyte.models.base_source import measure_fingerprint
from halfbyte.models.record import RECORD
from halfbyte.models.sources import require_apart
from halfbyte.storage.atomic import check_free_space, new_directory
from halfbyte.storage.files import open_regular
from halfbyte.storage.json_file import read_json_object


@dataclass(frozen=True, slots=True)
class Unmerged:
    """A copy of a base.

    Attributes:
        path: Its directory.
        base: What was copied.
        fingerprint: Of its tensors.
    """

    path: Path
    base: Path
    fingerprint: str


def unmerge(
    merged: str | Path, *, out: str | Path, base: str | Path | None = None, replace: bool = False
) -> Unmerged:
    """Copy the base of a merged model, file by file, once its tensors are known to be the ones.

    Args:
        merged: Directory of a merged model.
        out: Where to write; must not exist, unless `replace`. It may be `merged` then.
        base: Where the base is, if it was moved since.
        replace: Put the base in the place of an older directory.

    Raises:
        FormatError: `merged` does not say what it was merged from.
        MissingFileError: The base is not there.
        VerificationError: What is there is another model, before or after copying.
        StorageError: `out` exists, or the disk has not enough space. Nothing is left there.
    """
    out, merged = Path(out), Path(merged)
    recorded, fingerprint = _recorded_base(merged)
    source = recorded if base is None else Path(base)
    if not source.is_dir():
        raise MissingFileError(
            f"{source}: the base that {merged} was merged from is not there",
            hint="Name where it is now: --base.",
        )
    require_apart(out, source)
    _require(source, fingerprint)
    files = sorted(path for path in source.iterdir() if path.is_file())
    check_free_space(out, sum(path.stat().st_size for path in files))
    with new_directory(out, replace=replace) as directory:
        for path in files:
            with open_regular(path):
                shutil.copyfile(path, directory / path.name)
        _require(directory, fingerprint)
    return Unmerged(out, source, fingerprint)


def _recorded_base(merged: Path) -> tuple[Path, str]:
    record = read_json_object(merged / RECORD).get("merge")
    base = record.get("base") if isinstance(record, dict) else None
    path, fingerprint = (
        (base.get("path"), base.get("fingerprint")) if isinstance(base, dict) else (None, None)
    )
    if not isinstance(path, str) or not isinstance(fingerprint, str):
        raise FormatError(
            f"{merged / RECORD}: path and fingerprint of a base expected, found none",
            hint="Only what `halfbyte merge` wrote can be unmerged.",
        )
    return Path(path), fingerprint


def _require(directory: Path, fingerprint: str) -> None:
    found = measure_fingerprint(open_shards(directory))
    if found != fingerprint:
        raise VerificationError(
            f"{directory} is not the base: fingerprint {fingerprint} expected, found {found}",
            hint="It was changed or quantized again since the merge.",
        )

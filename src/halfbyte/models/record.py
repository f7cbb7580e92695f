"""`halfbyte.json`: what `halfbyte quantize` notes of a model directory it wrote."""

from pathlib import Path

from halfbyte.storage.json_file import read_json_object

RECORD = "halfbyte.json"


def recorded_fingerprint(directory: Path) -> str | None:
    """The fingerprint of the directory's tensors, or None in directories that others wrote.

    Raises:
        FormatError: The file is not a JSON object.
    """
    path = directory / RECORD
    if not path.is_file():
        return None
    fingerprint = read_json_object(path).get("fingerprint")
    return fingerprint if isinstance(fingerprint, str) else None

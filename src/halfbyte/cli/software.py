"""What is installed: versions, torch's build, a compiler, and the kernels that will run."""

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from halfbyte import __version__
from halfbyte.errors import HalfbyteError

REQUIRED = (
    "gguf",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "numpy",
    "pydantic",
    "PyYAML",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "typer",
    "zstandard",
)
OPTIONAL = {
    "pyarrow": "reads Parquet data",
    "tensorboard": "output.report_to",
    "wandb": "output.report_to",
}
"""Package -> what it is for."""

COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True, slots=True)
class Backend:
    """A set of kernel bodies.

    Attributes:
        name: `reference`, `native`, ...
        in_use: Whether operators run on it.
        reason: Why it is in use, or why not.
        broken: Whether it is present and does not load, so that nothing runs.
    """

    name: str
    in_use: bool
    reason: str
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Torch:
    """The torch that is installed.

    Attributes:
        version: As torch says it, or None when it cannot be imported.
        failure: Why it cannot be imported; empty otherwise.
        cuda: CUDA version of the build, or None for a build without.
        gpus: Names of the GPUs that it can use.
        num_threads: Threads for one operator.
    """

    version: str | None
    failure: str
    cuda: str | None
    gpus: tuple[str, ...]
    num_threads: int


@dataclass(frozen=True, slots=True)
class Software:
    """All that `doctor` knows about the installation.

    Attributes:
        python: Its version.
        halfbyte: Its version.
        torch: The torch that is installed.
        required: Package -> version, None when missing.
        optional: The same for packages that some features need.
        compiler: Path of a C++ compiler, or None.
        backends: Kernel backends, whether each is in use and why.
    """

    python: str
    halfbyte: str
    torch: Torch
    required: dict[str, str | None]
    optional: dict[str, str | None]
    compiler: str | None
    backends: tuple[Backend, ...]


def read_software() -> Software:
    """Describe the installation; imports torch."""
    torch = read_torch()
    return Software(
        python=platform.python_version(),
        halfbyte=__version__,
        torch=torch,
        required=versions(REQUIRED),
        optional=versions(OPTIONAL),
        compiler=next(filter(None, map(shutil.which, COMPILERS)), None),
        backends=read_backends() if torch.version else (),
    )


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Installed version of each package, None for those that are missing."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def read_torch(load: Callable[[str], object] = importlib.import_module) -> Torch:
    """Import torch and ask it; a torch that does not import is a finding, not an error."""
    try:
        load("torch")
    except (ImportError, OSError) as error:
        return Torch(None, f"{type(error).__name__}: {error}", None, (), 0)
    import torch

    available = torch.cuda.is_available()
    return Torch(
        version=torch.__version__,
        failure="",
        cuda=torch.version.cuda,
        gpus=tuple(
            torch.cuda.get_device_name(i)
            for i in range(torch.cuda.device_count() if available else 0)
        ),
        num_threads=torch.get_num_threads(),
    )


def read_backends() -> tuple[Backend, ...]:
    """Every kernel backend with its reason.

    The one place that knows how `halfbyte.kernels` describes itself.
    """
    if importlib.util.find_spec("halfbyte.kernels") is None:
        return (
            Backend("reference", in_use=True, reason="plain torch; this version has no faster one"),
        )
    try:
        status = importlib.import_module("halfbyte.kernels.backends").status()
    except HalfbyteError as error:
        return (Backend("native", in_use=False, reason=str(error), broken=True),)
    return tuple(Backend(s.name, s.in_use, s.reason) for s in status)

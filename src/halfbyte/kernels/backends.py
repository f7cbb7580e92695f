"""Which bodies run, and why not faster ones.

A backend that cannot run here says so and the reference bodies are used, which is visible in
`status()` and in `halfbyte doctor`. A backend that is present but broken raises: a slow run that
nobody asked for is worse than an error.

Environment variables, for debugging:
    HALFBYTE_BACKEND   `reference` leaves the native kernels out, `native` demands them
    HALFBYTE_CPU_ISA   `avx512bf16`, `avx2` or `portable`: use these and nothing faster
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.errors import BackendError, UsageError
from halfbyte.formats import ops  # noqa: F401  (defines the schemas that native bodies belong to)

BACKEND_VARIABLE = "HALFBYTE_BACKEND"
ISA_VARIABLE = "HALFBYTE_CPU_ISA"

_HERE = Path(__file__).parent
REBUILD = (
    "Rebuild in the clone: `pip install --no-build-isolation --force-reinstall --no-deps -e .`"
)


@dataclass(frozen=True, slots=True)
class Backend:
    """Bodies of the operators for one device type.

    Attributes:
        name: What HALFBYTE_BACKEND calls it.
        device_type: Where it runs; empty for every device.
        library: The shared library that registers the bodies, or None when they are Python.
    """

    name: str
    device_type: str
    library: Path | None = None

    def unavailable_because(self) -> str | None:
        """Why the backend cannot run here, or None when it can."""
        if self.library is None or self.library.exists():
            return None
        note = self.library.with_name("_build_failure.txt")
        if note.exists():
            return note.read_text(encoding="utf-8").strip()
        return f"{self.library.name} has not been built: {REBUILD}"

    def load(self) -> None:
        """Register the bodies.

        Raises:
            BackendError: The library is there, but the dynamic linker or PyTorch refuses it.
        """
        if self.library is None:
            return
        try:
            torch.ops.load_library(self.library)
        except (OSError, RuntimeError) as error:
            raise BackendError(
                f"{self.library} does not load: {error}",
                hint=f"{REBUILD} Or set {BACKEND_VARIABLE}=reference to run without it.",
            ) from error


REFERENCE = Backend("reference", "")
NATIVE = Backend("native", "cpu", _HERE / "_native.so")
BACKENDS = (NATIVE, REFERENCE)
"""Fastest first."""


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """One line of `halfbyte doctor`."""

    name: str
    in_use: bool
    reason: str


_loaded: dict[str, str] = {}
"""Name of each backend -> why it is not in use; empty when it is."""


def load() -> None:
    """Load what this machine and the environment allow. Called once, by the package.

    Raises:
        UsageError: An environment variable has a value that means nothing.
        BackendError: A backend is broken, or was demanded and is absent.
    """
    wanted = os.environ.get(BACKEND_VARIABLE, "")
    names = [backend.name for backend in BACKENDS]
    if wanted and wanted not in names:
        raise UsageError(
            f"{BACKEND_VARIABLE}: one of {', '.join(names)} expected, found {wanted!r}"
        )
    for backend in BACKENDS:
        reason = backend.unavailable_because()
        if reason and wanted == backend.name:
            raise BackendError(
                f"{BACKEND_VARIABLE}={wanted} demands kernels that are absent: {reason}"
            )
        if wanted == REFERENCE.name and backend != REFERENCE:
            reason = f"{BACKEND_VARIABLE}={wanted} is set"
        if not reason:
            backend.load()
        _loaded[backend.name] = reason or ""
    if native_in_use() and (isa := os.environ.get(ISA_VARIABLE)):
        use_cpu_isa(isa)


def native_in_use() -> bool:
    """Whether operators on CPU tensors run native kernels."""
    return _loaded.get(NATIVE.name) == ""


def status() -> tuple[BackendStatus, ...]:
    """Every backend, fastest first, and what it runs on or why it is not in use."""
    lines = []
    for backend in BACKENDS:
        reason = _loaded[backend.name]
        if not reason and backend == NATIVE:
            reason = f"instruction set {cpu_isa()}, of {', '.join(cpu_isas())} on this machine"
        elif not reason:
            reason = "every operator without a faster body, on any device"
        lines.append(BackendStatus(backend.name, not _loaded[backend.name], reason))
    return tuple(lines)


def cpu_isa() -> str:
    """The instruction set that native kernels use, or `none` without them."""
    return str(torch.ops.halfbyte.cpu_isa()) if native_in_use() else "none"


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that can be forced on this machine, fastest first; empty without kernels."""
    if not native_in_use():
        return ()
    return tuple(str(torch.ops.halfbyte.cpu_isas()).split(","))


def use_cpu_isa(name: str) -> None:
    """Let native kernels of the whole process use this instruction set from now on.

    Raises:
        UsageError: The machine or the build does not have it.
    """
    if name not in cpu_isas():
        available = ", ".join(cpu_isas()) or "none, because native kernels are not in use"
        raise UsageError(f"instruction set {name!r} cannot be used here; available: {available}")
    torch.ops.halfbyte.use_cpu_isa(name)
    gemm_dtypes.cache_clear()


@functools.cache
def gemm_dtypes() -> frozenset[torch.dtype]:
    """Dtypes in which matrices are multiplied faster by native kernels than by PyTorch."""
    if not native_in_use():
        return frozenset()
    names = str(torch.ops.halfbyte.gemm_dtypes()).split(",")
    return frozenset(getattr(torch, name) for name in names if name)


@contextlib.contextmanager
def cpu_isa_forced(name: str) -> Iterator[None]:
    """`use_cpu_isa` for the length of a `with` block."""
    before = cpu_isa()
    use_cpu_isa(name)
    try:
        yield
    finally:
        use_cpu_isa(before)

"""Build the native kernels where a compiler and torch are present; metadata is in pyproject.toml.

Without them the package installs as pure Python, with the reason in `kernels/_build_failure.txt`,
which `halfbyte doctor` prints. A compiler that finds an error in our sources is a failed
installation, not a reason: set HALFBYTE_BUILD_NATIVE=0 to install without kernels on purpose.

HALFBYTE_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer
(`scripts/sanitize.sh`).
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
KERNELS = Path("src/halfbyte/kernels")
REASON_FILE = "_build_failure.txt"
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of PyTorch 2.11: `from_blob` with a deleter

COMPILE = [
    "-std=c++20",
    "-O3",
    "-Wall",
    "-Wextra",
    "-Werror",
    # Helpers are static, so that each instruction set has its own; no source uses all of them.
    "-Wno-unused-function",
    "-fvisibility=hidden",
    # Decoding a scale takes two roundings: a fused multiply-add would give other bits.
    "-ffp-contract=off",
    # Comparisons with a NaN count; what they trap does not, and loops vectorise without.
    "-fno-trapping-math",
    "-fno-math-errno",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g1",
    "-O1",
]


def reason_against_native() -> str | None:
    """Why native kernels cannot be built here, or None."""
    if os.environ.get("HALFBYTE_BUILD_NATIVE") == "0":
        return "HALFBYTE_BUILD_NATIVE=0 was set at installation"
    if sys.platform == "win32":
        return "native kernels are built with GCC or Clang; Windows is not supported"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler was found at installation: {compiler!r} is not on PATH"
    try:
        import torch  # noqa: F401, PLC0415  (absent in isolated builds)
    except ImportError:
        return (
            "torch was not present at installation; install it first, then `pip install "
            "--no-build-isolation`"
        )
    return None


class BuildKernels(build_ext):
    """One shared library, loaded by `torch.ops.load_library`: no Python in its name or symbols."""

    def get_ext_filename(self, fullname: str) -> str:
        """The file, relative to the source root."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:  # noqa: ARG002
        """None: the library has no init function."""
        return []

    def build_extensions(self) -> None:
        """Compile with the C++ compiler, several sources at a time."""
        compiler = os.environ.get("CXX", "c++").split()
        self.compiler.set_executables(
            compiler_so=[*compiler, "-fPIC"],
            compiler_so_cxx=[*compiler, "-fPIC"],
            linker_so=[*compiler, "-shared"],
            linker_so_cxx=[*compiler, "-shared"],
        )
        super().build_extensions()


def native_extension() -> Extension:
    """The kernels, against the headers and libraries of the torch that is installed."""
    from torch.utils import cpp_extension  # noqa: PLC0415

    sanitize = SANITIZE if os.environ.get("HALFBYTE_SANITIZE") == "1" else []
    libraries = cpp_extension.library_paths()
    return Extension(
        "halfbyte.kernels._native",
        sources=sorted(str(p) for p in (KERNELS / "native").glob("*.cpp")),
        depends=sorted(str(p) for p in (KERNELS / "native").glob("*.h")),
        library_dirs=libraries,
        libraries=["c10", "torch", "torch_cpu"],
        # As system headers: warnings in torch's own are not ours to mend.
        extra_compile_args=[
            *COMPILE,
            *sanitize,
            *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        ],
        extra_link_args=[*sanitize, *(f"-Wl,-rpath,{path}" for path in libraries)],
        language="c++",
    )


def main() -> None:
    """Run setuptools with the kernels, or with a note on why there are none."""
    reason = reason_against_native()
    note = ROOT / KERNELS / REASON_FILE
    if reason is None:
        note.unlink(missing_ok=True)
        setup(ext_modules=[native_extension()], cmdclass={"build_ext": BuildKernels})
    else:
        note.write_text(reason + "\n", encoding="utf-8")
        print(f"halfbyte: building without native kernels: {reason}", file=sys.stderr)  # noqa: T201
        setup()


main()

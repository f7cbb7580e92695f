"""What runs, and the reasons given when it does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte.errors import BackendError, UsageError
from halfbyte.kernels import backends
from halfbyte.kernels.backends import NATIVE, REFERENCE, Backend


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load` starts anew and its record is thrown away."""
    monkeypatch.setattr(backends, "_loaded", {})
    monkeypatch.delenv(backends.BACKEND_VARIABLE, raising=False)
    monkeypatch.delenv(backends.ISA_VARIABLE, raising=False)


def test_a_library_that_was_not_built_says_so(tmp_path: Path) -> None:
    absent = Backend("native", "cpu", tmp_path / "_native.so")
    assert "has not been built" in str(absent.unavailable_because())
    (tmp_path / "_build_failure.txt").write_text("no C++ compiler was found\n")
    assert absent.unavailable_because() == "no C++ compiler was found"
    assert REFERENCE.unavailable_because() is None


def test_a_library_that_does_not_load_raises(tmp_path: Path) -> None:
    library = tmp_path / "_native.so"
    library.write_bytes(b"not a library")
    broken = Backend("native", "cpu", library)
    assert broken.unavailable_because() is None
    with pytest.raises(BackendError, match="does not load"):
        broken.load()


def test_an_absent_backend_is_recorded_and_not_raised(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    absent = Backend("native", "cpu", tmp_path / "_native.so")
    monkeypatch.setattr(backends, "BACKENDS", (absent, REFERENCE))
    backends.load()
    native, reference = backends.status()
    assert not native.in_use
    assert "has not been built" in native.reason
    assert reference.in_use
    assert backends.cpu_isa() == "none"
    assert backends.cpu_isas() == ()
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "native")
    with pytest.raises(BackendError, match="demands kernels that are absent"):
        backends.load()


def test_the_reference_can_be_forced(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "reference")
    backends.load()
    assert backends.status()[0].reason == "HALFBYTE_BACKEND=reference is set"
    assert not backends.native_in_use()


def test_unknown_names_are_errors(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "fast")
    with pytest.raises(UsageError, match="one of native, reference expected, found 'fast'"):
        backends.load()
    with pytest.raises(UsageError, match="instruction set 'sse' cannot be used here"):
        backends.use_cpu_isa("sse")


def test_an_instruction_set_is_forced_for_a_block(isa: str) -> None:
    assert backends.cpu_isa() == isa
    assert isa in backends.status()[0].reason
    with pytest.raises(RuntimeError, match="no kernels named 'sse' run on this machine"):
        torch.ops.halfbyte.use_cpu_isa("sse")


@pytest.mark.skipif(NATIVE.unavailable_because() is not None, reason="native kernels are absent")
def test_environment_decides_in_a_new_process() -> None:
    code = (
        "import halfbyte, torch; from halfbyte.kernels import backends as b;"
        "halfbyte.quantize(torch.ones(64)); print(b.cpu_isa())"
    )
    for variables, expected in [
        ({backends.ISA_VARIABLE: "portable"}, "portable"),
        ({backends.BACKEND_VARIABLE: "reference"}, "none"),
    ]:
        command = [sys.executable, "-c", code]
        environment = os.environ | variables
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == expected

"""The public names of `halfbyte`: adding or removing one is a decision, taken here."""

import subprocess
import sys

import pytest

import halfbyte

PUBLIC = {
    "DoubleQuantized",
    "ErrorReport",
    "HalfbyteError",
    "QuantizedTensor",
    "__version__",
    "attach",
    "compose",
    "double_quantize",
    "load",
    "error_report",
    "linear",
    "merge",
    "optim",
    "quantize",
    "quantize_model",
    "resume",
    "train",
    "unmerge",
}


def test_public_names_are_pinned() -> None:
    assert set(halfbyte.__all__) == PUBLIC
    assert set(dir(halfbyte)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(halfbyte, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = halfbyte.quantise


def test_importing_halfbyte_does_not_import_torch() -> None:
    code = "import halfbyte, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Fine-tune, compose and run language models in half a byte per weight."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "DoubleQuantized": "halfbyte.formats.double_quantization",
    "ErrorReport": "halfbyte.formats.error_report",
    "HalfbyteError": "halfbyte.errors",
    "QuantizedTensor": "halfbyte.formats.quantized_tensor",
    "attach": "halfbyte.adapters.modules",
    "compose": "halfbyte.composition.compose",
    "double_quantize": "halfbyte.formats.double_quantization",
    "error_report": "halfbyte.formats.error_report",
    "linear": "halfbyte.kernels.linear",
    "load": "halfbyte.generation.model",
    "merge": "halfbyte.composition.merge",
    "optim": "halfbyte.optim",
    "quantize": "halfbyte.formats.quantized_tensor",
    "quantize_model": "halfbyte.models.quantize_model",
    "resume": "halfbyte.composition.runs",
    "train": "halfbyte.composition.runs",
    "unmerge": "halfbyte.composition.unmerge",
}
"""Public name -> the module that defines it, or is it, imported when the name is first used."""

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604  (the table is the single list of names)

if TYPE_CHECKING:
    from halfbyte import optim as optim
    from halfbyte.adapters.modules import attach as attach
    from halfbyte.composition.compose import compose as compose
    from halfbyte.composition.merge import merge as merge
    from halfbyte.composition.runs import resume as resume
    from halfbyte.composition.runs import train as train
    from halfbyte.composition.unmerge import unmerge as unmerge
    from halfbyte.errors import HalfbyteError as HalfbyteError
    from halfbyte.formats.double_quantization import DoubleQuantized as DoubleQuantized
    from halfbyte.formats.double_quantization import double_quantize as double_quantize
    from halfbyte.formats.error_report import ErrorReport as ErrorReport
    from halfbyte.formats.error_report import error_report as error_report
    from halfbyte.formats.quantized_tensor import QuantizedTensor as QuantizedTensor
    from halfbyte.formats.quantized_tensor import quantize as quantize
    from halfbyte.generation.model import load as load
    from halfbyte.kernels.linear import linear as linear
    from halfbyte.models.quantize_model import quantize_model as quantize_model


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562 fixes the signature)
    if name not in _HOMES:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    if _HOMES[name] != "halfbyte.errors":
        importlib.import_module("halfbyte.kernels")  # faster bodies, before any operator runs
    home = importlib.import_module(_HOMES[name])
    value = home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

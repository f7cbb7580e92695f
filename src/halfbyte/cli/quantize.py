"""`halfbyte quantize`: any model to a 4-bit model directory, tensor by tensor."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.output import current_output, format_bytes
from halfbyte.cli.parsing import example, new_app
from halfbyte.cli.progress import Advance, show_progress

if TYPE_CHECKING:
    from halfbyte.models.quantize_model import Progress, QuantizedModel

PICTURE = "error_report.png"

app = new_app()


@app.command(
    epilog=example(
        "halfbyte quantize models/smollm2 models/smollm2-nf4",
        "halfbyte quantize SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2-nf4 --report",
        "halfbyte quantize HuggingFaceTB/SmolLM2-135M-Instruct models/smollm2-nf4 "
        "--keep '*.down_proj'",
    )
)
def quantize(
    src: Annotated[
        str, typer.Argument(help="Model directory, GGUF file, or hub id.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write.", show_default=False)],
    *,
    codebook: Annotated[
        str, typer.Option(help="nf4, fp4, int4 or int4_affine; transformers reads the first two.")
    ] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Store scales in 8 bits.")] = True,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Leave weights of this pattern in 16 bits; may be repeated."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Measure every weight's error: JSON and a picture.")
    ] = False,
    shard_size: Annotated[str, typer.Option(help="Largest file: 5GB, 500MB.")] = "5GB",
    replace: Annotated[
        bool, typer.Option("--replace", help="Put the result in the place of an older OUT.")
    ] = False,
) -> None:
    """Quantize a model to 4 bits, in bounded memory.

    OUT is an ordinary Hugging Face directory that transformers with bitsandbytes loads. It is
    there whole or not at all. Embeddings, head and norms stay in 16 bits.
    """
    from halfbyte.models.quantize_model import quantize_model

    start = time.monotonic()
    with contextlib.ExitStack() as stack, ending_cleanly():
        model = quantize_model(
            src,
            out,
            codebook=codebook,
            block_size=block_size,
            double_quant=double_quant,
            keep=keep or (),
            report=report,
            shard_bytes=parse_size(shard_size),
            replace=replace,
            progress=_shown(stack),
        )
    if model.report is not None:
        _draw(model)
    _show(model, src, time.monotonic() - start)


def parse_size(text: str) -> int:
    """Bytes of a size such as `500MB`, `5GB`, `2GiB` or `1000`.

    Raises:
        UsageError: It is not a size, or zero.
    """
    import re

    from halfbyte.errors import UsageError

    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    units |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "B": 1}
    match = re.fullmatch(r"(\d{1,12})\s*([KMG]?I?B|)", text.strip().upper())
    size = int(match[1]) * units.get(match[2], 0) if match else 0
    if not size:
        raise UsageError(f"--shard-size: a size such as 5GB or 500MiB expected, found {text!r}")
    return size


def _shown(stack: contextlib.ExitStack) -> Callable[["Progress"], None]:
    """Progress on the terminal; the bar opens with the first tensor, when the total is known."""
    advance: Advance | None = None
    shown = 0

    def show(progress: "Progress") -> None:
        nonlocal advance, shown
        if advance is None:
            bar = show_progress("quantizing", progress.total, in_bytes=True)
            advance = stack.enter_context(bar)
        advance(progress.done - shown)
        shown = progress.done

    return show


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, which removes what was being written."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _draw(model: "QuantizedModel") -> None:
    from halfbyte.evaluation.error_plot import plot_errors

    assert model.report is not None  # noqa: S101  (the caller asked)
    plot_errors(model.report, model.path / PICTURE, title=model.path.name)


def _show(model: "QuantizedModel", src: str, seconds: float) -> None:
    from halfbyte.formats.error_report import COLUMNS
    from halfbyte.models.quantize_model import REPORT

    output = current_output()
    for note in model.notes:
        output.note(f"note: {note}")
    output.text(
        f"{src} -> {model.path}: {model.num_quantized} weights in 4 bits, {model.num_kept} tensors "
        f"in 16 bits; {format_bytes(model.source_bytes)} -> {format_bytes(model.nbytes)} in "
        f"{seconds:.1f} s"
    )
    output.text(f"fingerprint {model.fingerprint}")
    if model.report is not None:
        output.table(COLUMNS, [r.cells() for r in (*model.report.tensors, model.report.total)])
        output.text(f"report: {model.path / REPORT}, picture: {model.path / PICTURE}")
    output.emit(
        {
            "path": str(model.path),
            "fingerprint": model.fingerprint,
            "source_bytes": model.source_bytes,
            "bytes": model.nbytes,
            "num_quantized": model.num_quantized,
            "num_kept": model.num_kept,
            "seconds": seconds,
            "notes": list(model.notes),
            "error": None if model.report is None else model.report.total.to_json(),
        }
    )

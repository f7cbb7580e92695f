"""`halfbyte merge`: an adapter into its base, with a certificate of what that changed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from halfbyte.cli.output import JsonValue, current_output, format_bytes
from halfbyte.cli.parsing import example, new_app
from halfbyte.cli.progress import Advance, show_progress
from halfbyte.cli.quantize import ending_cleanly, parse_size

if TYPE_CHECKING:
    from halfbyte.composition.certificate import Certificate
    from halfbyte.composition.merge import Merge
    from halfbyte.composition.merge_job import Progress

app = new_app()


@app.command(
    epilog=example(
        "halfbyte merge models/smollm2-nf4 runs/e2e/adapter --out models/e2e",
        "halfbyte merge models/smollm2-nf4 runs/e2e/adapter --out models/e2e-nf4 --dtype nf4 \\\n"
        "    --calibration train.jsonl --probe held-out.jsonl",
        "halfbyte merge models/smollm2-nf4 runs/e2e/adapter --out models/e2e-nf4 --dtype nf4 "
        "--residual-rank 8",
    )
)
def merge(
    model: Annotated[
        Path, typer.Argument(help="Directory of the adapter's base.", show_default=False)
    ],
    adapter: Annotated[Path, typer.Argument(help="Adapter directory.", show_default=False)],
    *,
    out: Annotated[Path, typer.Option(help="Directory to write.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, nf4 or fp4.")] = "bf16",
    base_weights: Annotated[
        str | None,
        typer.Option(help="16-bit model that takes the adapter, instead of the decoded base."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text to choose 4-bit codes on; best the adapter's training data."),
    ] = None,
    probe: Annotated[
        str | None, typer.Option(help="Text to judge the result by; others than those trained on.")
    ] = None,
    data_format: Annotated[
        str, typer.Option(help="How rows of these texts are read, as data.format of a run.")
    ] = "auto",
    residual_rank: Annotated[
        int, typer.Option(help="Keep a residual adapter of this rank beside a 4-bit model.")
    ] = 0,
    max_divergence: Annotated[
        float, typer.Option(help="Refuse beyond this part of the base's own divergence.")
    ] = 0.5,
    min_gain: Annotated[
        float, typer.Option(help="Refuse below this part of the adapter's gain.")
    ] = 0.5,
    accept: Annotated[
        bool, typer.Option("--accept", help="Write it in spite of the limits, and record that.")
    ] = False,
    shard_size: Annotated[str, typer.Option(help="Largest file: 5GB, 500MB.")] = "5GB",
    replace: Annotated[
        bool, typer.Option("--replace", help="Put the result in the place of an older OUT.")
    ] = False,
) -> None:
    """Merge an adapter into its base: an ordinary model directory, and what the merge changed.

    The result is compared with base and adapter on a text; one that is too far off is refused
    with exit code 3. OUT is there whole or not at all.
    """
    from halfbyte.composition.certificate import Limits, MergeRefusedError
    from halfbyte.composition.merge import merge as start

    with ending_cleanly():
        try:
            with _shown() as progress:
                made = start(
                    model,
                    adapter,
                    out=out,
                    dtype=dtype,
                    base_weights=base_weights,
                    calibration=calibration,
                    probe=probe,
                    data_format=data_format,
                    residual_rank=residual_rank,
                    limits=Limits(max_divergence, min_gain),
                    accept=accept,
                    shard_bytes=parse_size(shard_size),
                    replace=replace,
                    progress=progress,
                )
        except MergeRefusedError as error:
            _table(error.certificate)
            raise
    _show(made)


@contextlib.contextmanager
def _shown() -> Iterator["Progress"]:
    """A bar for each thing that is being done."""
    with contextlib.ExitStack() as stack:
        current, shown = "", 0.0
        advance: Advance | None = None

        def show(what: str, part: float) -> None:
            nonlocal current, shown, advance
            if what != current or advance is None:
                stack.close()
                advance = stack.enter_context(show_progress(what, 1.0))
                current, shown = what, 0.0
            advance(part - shown)
            shown = part

        yield show


def _table(certificate: "Certificate") -> None:
    from halfbyte.composition.certificate import COLUMNS

    current_output().table(COLUMNS, certificate.rows())


def _show(made: "Merge") -> None:
    from halfbyte.composition.merge import REPORT

    output = current_output()
    for note in made.notes:
        output.note(f"note: {note}")
    _table(made.certificate)
    if made.certificate.faults():
        output.note("accepted in spite of: " + "; ".join(made.certificate.faults()))
    output.text(
        f"{made.path}: {made.certificate.chosen}, {format_bytes(made.nbytes)}, "
        f"fingerprint {made.fingerprint}"
    )
    if made.residual is not None:
        output.text(f"use it with its residual: --adapter {made.residual}")
    output.text(f"report: {made.path / REPORT}")
    report = cast("dict[str, JsonValue]", made.certificate.to_json())
    output.emit(
        {
            "path": str(made.path),
            "fingerprint": made.fingerprint,
            "bytes": made.nbytes,
            "residual": None if made.residual is None else str(made.residual),
            "report": report,
        }
    )

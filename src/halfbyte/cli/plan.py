"""`halfbyte plan`: memory, disk and time of a run before it starts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.output import Output, current_output, format_bytes
from halfbyte.cli.parsing import example, new_app
from halfbyte.cli.run_config import read_run_config
from halfbyte.cli.run_view import format_duration

if TYPE_CHECKING:
    from halfbyte.training.plan import Plan

app = new_app()


@app.command(
    epilog=example(
        "halfbyte plan run.yaml memory.budget=2GB memory.recompute=auto",
        "halfbyte plan --model models/smollm2-nf4 --data train.jsonl lora.rank=64",
    )
)
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE ...]",
            help="A YAML file, and settings that win over it, as for `halfbyte train`.",
        ),
    ] = None,
    *,
    model: Annotated[str | None, typer.Option(help="The model directory.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training data: a file, a folder, or a glob in quotes.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory to be; nothing stays there.")
    ] = None,
) -> None:
    """Predict the peak memory, disk and time of a run, and the largest settings that fit.

    A few hundred tokens are trained on in a process of its own to measure them. Without
    memory.budget the limit is the memory that is left. The exit code is 4 when the run does not
    fit; the message names the nearest configuration that does.
    """
    options = {"model": model, "data.train": data, "output.dir": None if out is None else str(out)}
    config = read_run_config(arguments or [], options, default_out="run")
    from halfbyte.training.choosing import plan_run

    output = current_output()
    output.note("measuring a few small steps")
    found, refusal = plan_run(config)
    _show(output, found)
    output.emit(found.record())
    if refusal is not None:
        raise refusal


def _show(output: Output, plan: "Plan") -> None:
    output.heading("peak resident memory")
    rows = [(name, format_bytes(size)) for name, size in plan.parts.items()]
    output.table(("part", "bytes"), [*rows, ("predicted", format_bytes(plan.peak_bytes))])
    verdict = "fits" if plan.peak_bytes <= plan.limit_bytes else "does not fit"
    output.text(f"  {verdict} {format_bytes(plan.limit_bytes)} ({plan.limit_from})")
    output.text()
    facts = {
        "micro-batch": f"{plan.micro_batch_tokens:,} tokens, the largest of this data "
        f"{plan.largest_micro_batch:,}",
        "recomputed": f"{plan.recompute} of {plan.num_layers} layers",
        "largest micro-batch": f"about {plan.largest.micro_batch_tokens:,} tokens, and so the "
        "longest document",
        "largest rank": "every weight is trained"
        if plan.largest.rank is None
        else f"about {plan.largest.rank:,}",
        "time": f"{plan.num_steps:,} steps of about {plan.seconds_per_step:.2f} s, "
        f"{format_duration(plan.seconds)} without evaluations",
        "disk": f"{format_bytes(plan.disk.total)} of {format_bytes(plan.disk.free)} free: "
        f"checkpoints {format_bytes(plan.disk.checkpoints)}, "
        f"result {format_bytes(plan.disk.result)}, paged {format_bytes(plan.disk.paged)}",
        "measured in": f"{plan.probe_seconds:.1f} s",
    }
    width = max(map(len, facts)) + 2
    for name, fact in facts.items():
        output.text(f"  {name:<{width}}{fact}")

"""`halfbyte train`: from a config, or from a few options, to a trained adapter."""

import textwrap
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.output import Output, current_output
from halfbyte.cli.parsing import example, new_app
from halfbyte.cli.run_config import read_run_config
from halfbyte.cli.run_view import finish, finish_merge, watch

app = new_app()


@app.command(
    epilog=example(
        "halfbyte train run.yaml training.learning_rate=1e-4",
        "halfbyte train --model models/smollm2-nf4 --data train.jsonl --out runs/first \\\n"
        "    lora.rank=8 training.num_epochs=3",
    )
)
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE ...]",
            help="A YAML file, and settings that win over it, such as lora.rank=8.",
        ),
    ] = None,
    *,
    model: Annotated[str | None, typer.Option(help="The model directory.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training data: a file, a folder, or a glob in quotes.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory; must be new.")] = None,
    on_top_of: Annotated[
        str | None, typer.Option(help="An adapter or stack to keep frozen below the new one.")
    ] = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="List every setting with its default, and leave.")
    ] = False,
) -> None:
    """Fine-tune a model on a data file.

    The run directory gets the resolved config, metrics.jsonl, checkpoints and the result. Ctrl-C
    (or SIGTERM) saves a checkpoint and exits with 75; `halfbyte resume` goes on from there, and
    from any crash, with the same results.
    """
    if settings:
        print_settings(current_output())
        return
    flags = {
        "model": model,
        "data.train": data,
        "output.dir": None if out is None else str(out),
        "lora.on_top_of": on_top_of,
    }
    config = read_run_config(arguments or [], flags)
    from halfbyte.training.run import train as start

    with watch(current_output()) as observer:
        result = start(config, observer)
    finish(current_output(), result)
    finish_merge(current_output(), result)


def print_settings(output: Output) -> None:
    """A line for each setting, and below it what it does."""
    from halfbyte.training.settings import describe_settings

    for setting in describe_settings():
        value = " (needed)" if setting.needed else f" = {setting.default}"
        choices = f"    one of {', '.join(setting.choices)}" if setting.choices else ""
        output.text(f"{setting.name}{value}{choices}")
        output.text(textwrap.indent(textwrap.fill(setting.meaning, 92), "    "))
        output.emit(
            {
                "name": setting.name,
                "needed": setting.needed,
                "default": setting.default,
                "choices": list(setting.choices),
                "meaning": setting.meaning,
            }
        )

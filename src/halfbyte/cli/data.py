"""`halfbyte data`: what a model will be trained on, before it is trained."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.data_output import (
    reading_record,
    show_epoch,
    show_reading,
    show_runs,
    show_sizes,
)
from halfbyte.cli.output import JsonValue, current_output
from halfbyte.cli.parsing import example, new_app

if TYPE_CHECKING:
    from collections.abc import Sequence

    from halfbyte.data.dataset import Dataset
    from halfbyte.data.packing import PackingOptions
    from halfbyte.data.reading import Reading
    from halfbyte.training.config import Config

app = new_app()

Model = Annotated[Path, typer.Argument(help="A model directory; its tokenizer is used.")]
Data = Annotated[str, typer.Argument(help="A file, a folder, or a glob in quotes.")]
RowFormat = Annotated[str | None, typer.Option(help="The row format, where it is not clear.")]
MaxLength = Annotated[int | None, typer.Option(help="Most tokens of a document.")]
Longer = Annotated[
    str | None, typer.Option(help="What to do with longer rows: refuse, truncate or drop.")
]
TrainOnPrompt = Annotated[bool, typer.Option("--train-on-prompt", help="Loss on every token.")]


@app.callback(
    no_args_is_help=True,
    epilog=example(
        "halfbyte data check models/smollm2 train.jsonl",
        "halfbyte data show models/smollm2 train.jsonl --row 3",
    ),
)
def data() -> None:
    """Show what a data set is to a model: format, tokens, lengths, what is trained."""


@app.command(
    epilog=example(
        "halfbyte data check models/smollm2 train.jsonl",
        "halfbyte data check models/smollm2 'data/*.jsonl' --max-length 512 --overlong drop \\\n"
        "    --eval-fraction 0.05 --tokens-per-step 4096",
    )
)
def check(
    model: Model,
    data: Data,
    *,
    format: RowFormat = None,  # noqa: A002  (the name of the option)
    max_length: MaxLength = None,
    overlong: Longer = None,
    train_on_prompt: TrainOnPrompt = False,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Data for evaluation, of its own.")
    ] = None,
    eval_fraction: Annotated[
        float | None, typer.Option(help="Part of the data to hold out, by prompts; 0 for none.")
    ] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(help="Most tokens of an optimizer step.")
    ] = None,
    micro_batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of a micro-batch; by default 2048, or those of the longest document."
        ),
    ] = None,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Similar lengths in a step.")
    ] = False,
) -> None:
    """Check every row and say what is found, in which format, and how long it is.

    The exit code is 1 when a row cannot be used.
    """
    from halfbyte.data.dataset import num_with_shared_prompts
    from halfbyte.data.packing import require_fitting
    from halfbyte.data.read import read_dataset
    from halfbyte.data.report import measure, shape_epoch
    from halfbyte.errors import UsageError
    from halfbyte.text.tokenizer import Tokenizer
    from halfbyte.training.data_options import data_options

    if evaluation is not None and eval_fraction is not None:
        raise UsageError("--eval and --eval-fraction exclude each other")
    config = _config(
        model,
        data,
        {
            "data.format": format,
            "data.max_length": max_length,
            "data.overlong": overlong,
            "data.train_on_prompt": train_on_prompt or None,
            "data.group_by_length": group_by_length or None,
            "data.eval": evaluation,
            "data.eval_fraction": eval_fraction,
            "training.tokens_per_step": tokens_per_step,
            "training.micro_batch_tokens": micro_batch_tokens,
        },
    )
    output, tokenizer = current_output(), Tokenizer.load(model)
    readings = []
    for location in [data] if evaluation is None else [data, evaluation]:
        readings.append(read_dataset(location, tokenizer, data_options(config.data)))
        show_reading(output, location, readings[-1])
    parts = _parts(readings, config)
    sizes = {name: measure(part) for name, part in parts.items()}
    num_shared = num_with_shared_prompts(parts["eval"], parts["train"]) if len(parts) > 1 else 0
    show_sizes(output, sizes)
    if num_shared:
        output.text(
            f"  note: {num_shared} of {len(parts['eval'])} documents for evaluation have a prompt "
            "that is also trained on"
        )
    epoch = None
    if "train" in parts:
        packing = _packing(config, parts["train"])
        require_fitting(parts["train"], packing)
        epoch = shape_epoch(parts["train"], packing)
        show_epoch(output, packing, epoch)
    num_problems = sum(reading.problems.count for reading in readings)
    output.emit(
        {
            "data": [reading_record(reading) for reading in readings],
            "sizes": {name: asdict(size) for name, size in sizes.items()},
            "num_eval_prompts_trained_on": num_shared,
            "epoch": None if epoch is None else asdict(epoch),
            "num_problems": num_problems,
        }
    )
    if num_problems:
        raise typer.Exit(1)


@app.command(
    epilog=example(
        "halfbyte data show models/smollm2 train.jsonl --row 3",
        "halfbyte data show models/smollm2 data/ --at part-2.jsonl:17",
    )
)
def show(
    model: Model,
    data: Data,
    *,
    row: Annotated[
        int | None, typer.Option(help="Number of the row, from 1 over all files.")
    ] = None,
    at: Annotated[
        str | None, typer.Option(help="Place of the row, as messages name it: FILE:LINE.")
    ] = None,
    format: RowFormat = None,  # noqa: A002  (the name of the option)
    max_length: MaxLength = None,
    overlong: Longer = None,
    train_on_prompt: TrainOnPrompt = False,
) -> None:
    """Print a row as the model will see it, with the trained tokens coloured.

    The row goes the way it goes in training: the same template, tokens, lengths and loss mask.
    """
    from halfbyte.data.read import read_one
    from halfbyte.data.report import runs
    from halfbyte.errors import UsageError
    from halfbyte.text.tokenizer import Tokenizer
    from halfbyte.training.data_options import data_options

    if row is not None and at is not None:
        raise UsageError("--row and --at exclude each other")
    if row is not None and row < 1:
        raise UsageError(f"--row: at least 1 expected, found {row}")
    config = _config(
        model,
        data,
        {
            "data.format": format,
            "data.max_length": max_length,
            "data.overlong": overlong,
            "data.train_on_prompt": train_on_prompt or None,
        },
    )
    tokenizer = Tokenizer.load(model)
    reading = read_one(data, tokenizer, data_options(config.data), at or row or 1)
    output = current_output()
    records: list[JsonValue] = []
    for document in range(len(reading.dataset)):
        place = str(reading.dataset.origin(document))
        found = runs(reading.dataset, document, tokenizer)
        show_runs(output, place, found)
        shown: list[JsonValue] = [asdict(run) for run in found]
        records.append({"at": place, "runs": shown})
    output.emit({"documents": records})


def _config(model: Path, data: str, flags: dict[str, object]) -> "Config":
    """The config of a run with these options, so that defaults and checks are those of runs."""
    from halfbyte.training.config_file import load_config

    return load_config(
        flags={"model": str(model), "data.train": data, "output.dir": "none", **flags}
    )


def _parts(readings: "Sequence[Reading]", config: "Config") -> "dict[str, Dataset]":
    """What a run would train on and evaluate, by name; a part without documents is left out."""
    from halfbyte.data.dataset import split_by_prompt

    names = ("train", "eval")
    parts = {name: one.dataset for name, one in zip(names, readings, strict=False)}
    if len(readings) == 1 and config.data.eval_fraction and len(parts["train"]):
        split = split_by_prompt(parts["train"], config.data.eval_fraction)
        parts = dict(zip(names, split, strict=True))
    return {name: part for name, part in parts.items() if len(part)}


def _packing(config: "Config", dataset: "Dataset") -> "PackingOptions":
    from halfbyte.data.packing import PackingOptions
    from halfbyte.training.choosing import micro_batch_tokens

    return PackingOptions(
        tokens_per_step=config.training.tokens_per_step,
        micro_batch_tokens=micro_batch_tokens(config, dataset.longest()[1]),
        seed=config.training.seed,
        group_by_length=config.data.group_by_length,
    )

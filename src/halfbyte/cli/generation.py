"""What `generate` and `chat` share: their options, opening the model, printing as text comes."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.output import Output

if TYPE_CHECKING:
    from halfbyte.generation.model import GenerateOptions, Model, TextPiece

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="[NAME=]PATH",
        help="An adapter or stack; may be repeated. All are used together unless --mix says else.",
    ),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Tokens at most.", show_default="256", min=1)
]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the most likely token.", show_default="0")
]
TopK = Annotated[int | None, typer.Option(help="Only the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Only tokens that make up this probability.")]
MinP = Annotated[
    float | None, typer.Option(help="Only tokens this likely relative to the most likely.")
]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 avoids what was said.")]
Seed = Annotated[int | None, typer.Option(help="Of the draws.", show_default="0")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="A string that ends the text; may be repeated.")
]


def options_of(
    *,
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    stop: list[str] | None,
) -> "GenerateOptions":
    """The options that were given; the others keep the defaults of `Sampling`."""
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or None,
    }
    return {key: value for key, value in given.items() if value is not None}  # type: ignore[return-value]


def open_model(path: Path, adapters: list[str] | None, mixes: list[str]) -> "Model":
    """The model with its adapters; a single mix is put to use.

    Raises:
        UsageError: A mix does not parse. That is found before the model is opened.
    """
    from halfbyte.cli.mix import name_adapters, parse_mix
    from halfbyte.generation.model import load

    named = name_adapters(adapters)
    choices = [parse_mix(mix, named) for mix in mixes]
    model = load(path, adapters=named)
    if len(choices) == 1:
        model.use(choices[0])
    return model


class Speed:
    """Tokens a second of a generation, for a note when it ends."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def record(self, num_tokens: int) -> dict[str, float]:
        """Fields for `--json`."""
        seconds = time.perf_counter() - self._begin
        return {
            "num_tokens": num_tokens,
            "seconds": seconds,
            "tokens_per_second": num_tokens / seconds,
        }


def print_stream(output: Output, pieces: Iterable["TextPiece"]) -> tuple[str, str, int]:
    """Print the text of one sequence as it comes.

    Returns:
        The text, why it ended, and the number of tokens.
    """
    stream = sys.stderr if output.json else sys.stdout
    text, finish, num_tokens = "", "length", 0
    for piece in pieces:
        text += piece.text
        num_tokens = piece.num_tokens
        finish = piece.finish or finish
        stream.write(piece.text)
        stream.flush()
    stream.write("\n")
    stream.flush()
    return text, finish, num_tokens

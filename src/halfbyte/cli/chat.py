"""`halfbyte chat`: talk to a model through its own chat template."""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from halfbyte.cli import generation
from halfbyte.cli.output import current_output
from halfbyte.cli.parsing import example, new_app

app = new_app()


@app.command(
    epilog=example(
        "halfbyte chat models/smollm2-nf4",
        'halfbyte chat MODEL --message "Name three rivers." --temperature 0.7',
    )
)
def chat(
    model: generation.ModelPath,
    *,
    message: Annotated[
        str | None, typer.Option(help="Say this, print the answer, and leave.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    adapter: generation.Adapters = None,
    mix: Annotated[
        str | None, typer.Option(help='Weights of named adapters: "0.7*sql + 0.3*tone".')
    ] = None,
    max_new_tokens: generation.MaxNewTokens = None,
    temperature: generation.Temperature = None,
    top_k: generation.TopK = None,
    top_p: generation.TopP = None,
    min_p: generation.MinP = None,
    repetition_penalty: generation.RepetitionPenalty = None,
    seed: generation.Seed = None,
    stop: generation.Stop = None,
) -> None:
    """Talk to a model, turn by turn, until the input ends. A line is a turn."""
    options = generation.options_of(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    output = current_output()
    opened = generation.open_model(model, adapter, [] if mix is None else [mix])
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in _turns(message):
        messages.append({"role": "user", "content": turn})
        speed = generation.Speed()
        text, finish, count = generation.print_stream(output, opened.chat(messages, **options))
        output.emit({"text": text, "finish": finish, **speed.record(count)})
        messages.append({"role": "assistant", "content": text})


def _turns(message: str | None) -> Iterator[str]:
    """The one message, or lines of stdin until it ends; empty lines are no turns."""
    if message is not None:
        yield message
        return
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")

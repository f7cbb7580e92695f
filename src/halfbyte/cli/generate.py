"""`halfbyte generate`: continue plain text; only the new text is printed."""

import sys
from typing import Annotated

import typer

from halfbyte.cli import generation
from halfbyte.cli.mix import parse_mix
from halfbyte.cli.output import current_output
from halfbyte.cli.parsing import example, new_app
from halfbyte.errors import UsageError

app = new_app()


@app.command(
    epilog=example(
        'halfbyte generate models/smollm2-nf4 "The capital of France is"',
        'halfbyte generate MODEL "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 7',
        "halfbyte generate MODEL --json < prompt.txt",
        'halfbyte generate MODEL "SELECT" --adapter sql=runs/sql/adapter \\\n'
        '    --adapter tone=runs/tone/adapter --mix "0.7*sql + 0.3*tone"',
    )
)
def generate(
    model: generation.ModelPath,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Texts to continue; stdin without any."),
    ] = None,
    *,
    adapter: generation.Adapters = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help='Weights of named adapters: "0.7*sql + 0.3*tone". For all prompts, or as often '
            "as there are prompts, one each."
        ),
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
    """Continue one text, or several at once, with a model as it is: no chat template.

    One text is printed as it comes. Several are computed in one batch, and each is printed, in
    order, when all are done.
    """
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
    texts = prompts or [sys.stdin.read()]
    if not all(texts):
        raise UsageError("the prompt is empty")
    output = current_output()
    mixes = mix or []
    if len(mixes) not in {0, 1, len(texts)}:
        expected = f"one, or one a prompt ({len(texts)}), expected"
        raise UsageError(f"--mix: {expected}; found {len(mixes)}")
    opened = generation.open_model(model, adapter, mixes)
    if len(mixes) > 1:
        options["adapters"] = [parse_mix(each, opened.adapters) for each in mixes]
    speed = generation.Speed()
    if len(texts) == 1:
        text, finish, count = generation.print_stream(output, opened.stream(texts, **options))
        output.emit({"text": text, "finish": finish, **speed.record(count)})
        return
    results = [("", "", 0)] * len(texts)
    for piece in opened.stream(texts, **options):
        text, finish, _ = results[piece.sequence]
        results[piece.sequence] = (text + piece.text, piece.finish or finish, piece.num_tokens)
    total = speed.record(sum(count for _, _, count in results))
    for index, (text, finish, count) in enumerate(results):
        output.heading(f"{index + 1}")
        output.text(text)
        output.emit({"prompt": index, "text": text, "finish": finish, "num_tokens": count})
    output.emit({"prompts": len(texts), **total})

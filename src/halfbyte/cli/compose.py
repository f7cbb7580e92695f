"""`halfbyte compose`: several adapters to one, by an expression."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from halfbyte.cli.output import JsonValue, current_output, format_bytes
from halfbyte.cli.parsing import example, new_app
from halfbyte.cli.progress import Advance, show_progress

if TYPE_CHECKING:
    from halfbyte.composition.compose import Composition, Progress
    from halfbyte.composition.search import FoundWeights

app = new_app()


@app.command(
    epilog=example(
        'halfbyte compose "0.7*sql + 0.3*tone" --adapter sql=runs/sql/adapter \\\n'
        "    --adapter tone=runs/tone/adapter --out adapters/mix",
        'halfbyte compose "a > b" --adapter a=A --adapter b=B --out AB --fidelity 0.999',
        'halfbyte compose "ties(a, b, density=0.5)" --adapter a=A --adapter b=B --out C --rank 32',
        "halfbyte compose --search few.jsonl --model BASE --adapter a=A --adapter b=B --out C",
    )
)
def compose(
    expression: Annotated[
        str | None, typer.Argument(help="Over the names of --adapter; not with --search.")
    ] = None,
    *,
    adapter: Annotated[list[str], typer.Option(help="NAME=PATH of an adapter; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Adapter directory to write.", show_default=False)],
    rank: Annotated[int | None, typer.Option(help="Compress to at most this rank.")] = None,
    fidelity: Annotated[
        float | None, typer.Option(help="Compress, keeping this part of each layer's energy.")
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="Find the weights of a mix on these examples, 16 to 64.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="The base, for --search.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put the result in the place of an older OUT.")
    ] = False,
) -> None:
    """Combine adapters into one that PEFT loads.

    Sums, differences and multiples are exact, whatever the ranks and layers; their ranks add up.
    `a > b` is a stack, b having been trained on top of a. `ties(a, b, density=0.5)` and
    `dare(a, b, drop=0.3, seed=1)` work on the true updates, and `svd(..., rank=16)` or
    `svd(..., fidelity=0.99)` compress. What a compression drops is measured and reported.

    With --search, the weights of a mix of all adapters are found on one half of the examples; the
    other half decides whether they are better than the uniform mix and than every single adapter.
    """
    from halfbyte.composition.compose import compose as start

    with contextlib.ExitStack() as stack:
        made = start(
            expression,
            adapters=parse_adapters(adapter),
            out=out,
            rank=rank,
            fidelity=fidelity,
            search=search,
            model=model,
            told=current_output().note,
            replace=replace,
            progress=_shown(stack),
        )
    _show(made)


def parse_adapters(bindings: list[str]) -> dict[str, Path]:
    """Name -> path of bindings such as `sql=runs/sql/adapter`.

    Raises:
        UsageError: One is no binding, its name cannot stand in an expression, or comes twice.
    """
    import re

    from halfbyte.composition.functions import KEYWORDS
    from halfbyte.errors import UsageError

    found: dict[str, Path] = {}
    problems = []
    for binding in bindings:
        name, equals, path = binding.partition("=")
        if not (equals and path):
            problems.append(f"{binding!r}: NAME=PATH expected")
        elif not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name in KEYWORDS:
            problems.append(
                f"{name!r}: a name of letters, digits and _ expected, none of {', '.join(KEYWORDS)}"
            )
        elif name in found:
            problems.append(f"{name}: bound to {found[name]} and to {path}")
        else:
            found[name] = Path(path)
    if problems:
        raise UsageError("--adapter", problems=problems)
    return found


def _shown(stack: contextlib.ExitStack) -> "Progress":
    """Progress by layers; the bar opens with the first, when their number is known."""
    advance: Advance | None = None

    def show(_done: int, total: int) -> None:
        nonlocal advance
        if advance is None:
            advance = stack.enter_context(show_progress("composing", total))
        advance(1)

    return show


def _show(made: "Composition") -> None:
    from halfbyte.composition.compose import REPORT_FILE
    from halfbyte.composition.report import COLUMNS

    output = current_output()
    for note in made.notes:
        output.note(f"note: {note}")
    if made.found is not None:
        _show_search(made.found)
    report = made.report
    ranks = sorted({layer.rank for layer in report.layers})
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    count = made.adapter.num_parameters
    output.text(
        f"{made.expression} -> {made.path}: {len(report.layers)} layers of rank {shown}, "
        f"{count:,} parameters, {format_bytes(4 * count)}"
    )
    if report.exact:
        output.text("exact: nothing was dropped")
    else:
        output.table(COLUMNS, list(report.rows()))
        output.text(f"layer by layer: {made.path / REPORT_FILE}")
    output.emit(
        {
            "path": str(made.path),
            "expression": made.expression,
            "parts": {name: part.fingerprint for name, part in made.parts.items()},
            "ranks": ranks,
            "num_parameters": count,
            "notes": list(made.notes),
            "search": None if made.found is None else cast("JsonValue", made.found.to_json()),
            "report": cast("JsonValue", report.to_json()),
        }
    )


def _show_search(found: "FoundWeights") -> None:
    columns = ("mix", "weights", f"{found.num_search} searched", f"{found.num_held_out} held out")
    rows = [
        (
            f"{candidate.label}{' *' if candidate is found.chosen else ''}",
            ", ".join(f"{name} {weight:g}" for name, weight in candidate.weights.items()),
            f"{candidate.search_loss:.4f}",
            f"{candidate.held_out_loss:.4f}",
        )
        for candidate in found.candidates
    ]
    current_output().table(columns, rows)
    current_output().text(
        f"* taken: the best on held-out examples; {found.num_gradients} gradients"
    )

"""`halfbyte stack`: adapters that were trained on top of each other, as one artifact."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.output import current_output
from halfbyte.cli.parsing import example, new_app

if TYPE_CHECKING:
    from halfbyte.adapters.stack import Stack

app = new_app()

StackPath = Annotated[Path, typer.Argument(metavar="STACK", help="A stack directory.")]
Out = Annotated[Path, typer.Option(help="The new directory.", show_default=False)]


@app.callback(
    no_args_is_help=True,
    epilog=example(
        "halfbyte train --model MODEL --data second.jsonl --out runs/second \\\n"
        "    --on-top-of runs/first/adapter",
        "halfbyte stack drop runs/second/adapter --out adapters/first",
    ),
)
def stack() -> None:
    """Build, shorten or flatten a stack: adapters trained one on top of the other.

    `halfbyte train --on-top-of` makes one. A stack is used wherever an adapter is. Its order is
    that of training: another one is refused.
    """


@app.command(epilog=example("halfbyte stack build adapters/a adapters/b --out adapters/a-b"))
def build(
    parts: Annotated[
        list[Path], typer.Argument(metavar="PART...", help="Adapters or stacks, lowest first.")
    ],
    *,
    out: Out,
) -> None:
    """Put adapters that were trained on top of each other into one directory."""
    from halfbyte.adapters.stack import Stack
    from halfbyte.adapters.stack_files import load_parts, write_stack

    built = Stack(tuple(part for path in parts for part in load_parts(path)))
    write_stack(built, out)
    _report(out, built)


@app.command(epilog=example("halfbyte stack drop runs/second/adapter --out adapters/first"))
def drop(stack: StackPath, *, out: Out) -> None:
    """Leave out the last adapter; one that is left alone is written as a plain adapter."""
    from halfbyte.adapters.peft_files import write_adapter
    from halfbyte.adapters.stack_files import read_stack, write_stack

    shorter = read_stack(stack).without_last()
    if len(shorter.parts) == 1:
        write_adapter(shorter.parts[0].adapter, out)
    else:
        write_stack(shorter, out)
    _report(out, shorter)


@app.command(epilog=example("halfbyte stack flatten runs/second/adapter --out adapters/flat"))
def flatten(stack: StackPath, *, out: Out) -> None:
    """Write one adapter that computes the same; its ranks are the sums of those of the parts."""
    from halfbyte.adapters.peft_files import write_adapter
    from halfbyte.adapters.stack_files import read_stack

    whole = read_stack(stack)
    flat = whole.flatten()
    write_adapter(flat, out)
    ranks = sorted({update.rank for update in flat.modules.values()})
    output = current_output()
    output.text(f"{out}: {whole.order} as one adapter, rank {', '.join(map(str, ranks))}")
    output.emit({"path": str(out), "order": whole.order, "ranks": ranks})


def _report(out: Path, stack: "Stack") -> None:
    output = current_output()
    output.text(f"{out}: {stack.order}")
    output.emit({"path": str(out), "base": stack.base, "parts": list(stack.below)})

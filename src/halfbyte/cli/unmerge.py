"""`halfbyte unmerge`: the base of a merged model, as it was."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.output import current_output
from halfbyte.cli.parsing import example, new_app
from halfbyte.cli.quantize import ending_cleanly

app = new_app()


@app.command(
    epilog=example(
        "halfbyte unmerge models/e2e-nf4 --out models/base",
        "halfbyte unmerge models/e2e-nf4 --out models/e2e-nf4 --replace --base /mnt/models/base",
    )
)
def unmerge(
    merged: Annotated[
        Path, typer.Argument(help="What `halfbyte merge` wrote.", show_default=False)
    ],
    *,
    out: Annotated[Path, typer.Option(help="Directory to write.", show_default=False)],
    base: Annotated[
        Path | None, typer.Option(help="Where the base is, if it was moved since.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put the base in the place of an older OUT.")
    ] = False,
) -> None:
    """Restore the base of a merged model, bit for bit.

    The base is copied from where the merge's record says that it is, once the fingerprint of its
    tensors is the recorded one. Nothing is subtracted from merged weights.
    """
    from halfbyte.composition.unmerge import unmerge as start

    with ending_cleanly():
        made = start(merged, out=out, base=base, replace=replace)
    output = current_output()
    output.text(f"{made.path}: the base from {made.base}, fingerprint {made.fingerprint}")
    output.emit({"path": str(made.path), "base": str(made.base), "fingerprint": made.fingerprint})

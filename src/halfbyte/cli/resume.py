"""`halfbyte resume`: go on with a run that was stopped, killed or lost its machine."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.output import current_output
from halfbyte.cli.parsing import example, new_app
from halfbyte.cli.run_view import finish, finish_merge, watch

app = new_app()


@app.command(epilog=example("halfbyte resume runs/first"))
def resume(run: Annotated[Path, typer.Argument(help="The run directory.")]) -> None:
    """Continue a run behind its newest valid checkpoint.

    The result is the same, bit for bit, as if the run had never stopped. Damaged checkpoints are
    passed over and named.
    """
    from halfbyte.training.run import resume as take_up

    with watch(current_output()) as observer:
        result = take_up(run, observer)
    finish(current_output(), result)
    finish_merge(current_output(), result)

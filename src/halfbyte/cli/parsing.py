"""What every command's parser has in common."""

import importlib
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from halfbyte.cli.commands import COMMANDS
from halfbyte.errors import UsageError


def new_app() -> typer.Typer:
    """An app for the functions of one command module."""
    return typer.Typer(
        add_completion=False,
        # Plain help: rich's panels cost as much time as all the rest, and wrap badly in pipes.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=False,
    )


def example(*commands: str) -> str:
    r"""An epilog for the help that shows commands to copy (`\b` keeps its lines apart)."""
    return "\b\n" + "\n".join(["Example:" if len(commands) == 1 else "Examples:", *commands])


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Parse the arguments of a command and run it.

    Returns:
        The exit code: 0, or what the command raised as `typer.Exit`.

    Raises:
        UsageError: The arguments do not parse.
        HalfbyteError: From the command.
        KeyboardInterrupt: A prompt met the end of its input.
    """
    command = get_command(importlib.import_module(COMMANDS[name].module).app)
    pending = [command]
    while pending:
        current = pending.pop()
        subcommands = getattr(current, "commands", {}).values()
        pending += subcommands
        if not subcommands:
            current.params += get_command(_common_app).params
    try:
        code = command.main(list(arguments), prog_name=f"halfbyte {name}", standalone_mode=False)
    except typer.Abort:  # the end of the input, where an answer was expected
        raise KeyboardInterrupt from None
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = f"halfbyte {name}" if context is None else context.command_path
        raise UsageError(error.format_message(), hint=f"Try `{path} --help`.") from error
    return code if isinstance(code, int) else 0


_common_app = new_app()


@_common_app.command()
def _common(
    *,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print JSON on stdout, and text on stderr.", expose_value=False
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error.", expose_value=False),
    ] = False,
) -> None:
    """Options that every command takes.

    `app.run` reads them before parsing, so that errors of parsing obey them too.
    """

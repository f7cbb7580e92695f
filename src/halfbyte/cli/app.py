"""The `halfbyte` program: find the command, run it, turn errors into exit codes.

The list of commands is a table, and a command's module is imported when that command is named.
So `halfbyte --help` needs neither torch nor a parser and answers in a few hundredths of a second.
"""

import difflib
import os
import sys
import traceback
from collections.abc import Sequence

from halfbyte import __version__
from halfbyte.cli.commands import COMMANDS
from halfbyte.cli.output import Output, current_output, use_output
from halfbyte.errors import DoesNotFitError, HalfbyteError, StorageError, UsageError

ABORTED = 130
CLOSED_PIPE = 141
"""What a shell reports for a program that SIGPIPE ended."""


def run(arguments: Sequence[str]) -> int:
    """Run a command line without the program's name.

    Returns:
        0 ok · 1 failure · 2 usage or config · 3 verification failed · 4 will not fit · 5 unsafe
        artifact refused · 75 stopped after saving a checkpoint · 130 aborted · 141 nobody
        reads the output any more.
    """
    output = Output(json="--json" in _before_separator(arguments))
    try:
        with use_output(output):
            code = _dispatch(arguments)
            output.flush()
    except BrokenPipeError:
        # The reader went away (`halfbyte inspect | head`). Python flushes stdout once more at
        # exit; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except KeyboardInterrupt:
        output.note("aborted")
        return ABORTED
    except (HalfbyteError, OSError, MemoryError) as error:
        if "--debug" in _before_separator(arguments):
            traceback.print_exc()
        return output.error(_as_user_error(error))
    return code


def help_text() -> str:
    """What `halfbyte --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "Usage: halfbyte COMMAND [ARGUMENTS]",
            "",
            "Fine-tune, compose and run language models in half a byte per weight.",
            "",
            "Commands:",
            *(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()),
            "",
            "Options:",
            "  --json     Print JSON on stdout, and text on stderr; every command takes it.",
            "  --debug    Show the traceback of an error; every command takes it.",
            "  --version  Print the version.",
            "  --help     Print this, or with a command its arguments and an example.",
            "",
            "Example:",
            "  halfbyte doctor",
        ]
    )


def _dispatch(arguments: Sequence[str]) -> int:
    rest = list(arguments)
    common = []
    while rest and rest[0] in {"--json", "--debug"}:
        common.append(rest.pop(0))
    output = current_output()
    if not rest or rest[0] in {"--help", "-h"}:
        output.text(help_text())
        output.emit({"commands": {name: command.help for name, command in COMMANDS.items()}})
        return 0
    if rest[0] == "--version":
        output.text(f"halfbyte {__version__}")
        output.emit({"version": __version__})
        return 0
    name = rest[0]
    if name not in COMMANDS:
        raise _unknown(name)
    from halfbyte.cli.parsing import run_command

    return run_command(name, [*rest[1:], *common])


def _unknown(name: str) -> UsageError:
    kind = "option" if name.startswith("-") else "command"
    known = ["--json", "--debug", "--version", "--help"] if kind == "option" else list(COMMANDS)
    close = difflib.get_close_matches(name, known, n=1)
    guess = f"Did you mean `{close[0]}`? " if close else ""
    return UsageError(
        f"no such {kind} {name!r}", hint=f"{guess}`halfbyte --help` lists the {kind}s."
    )


def _before_separator(arguments: Sequence[str]) -> list[str]:
    """What stands before `--`: after it, nothing is an option."""
    arguments = list(arguments)
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _as_user_error(error: HalfbyteError | OSError | MemoryError) -> HalfbyteError:
    if isinstance(error, HalfbyteError):
        return error
    if isinstance(error, MemoryError):
        return DoesNotFitError(
            f"out of memory: {error}" if str(error) else "out of memory",
            hint="`halfbyte doctor` shows how much there is.",
        )
    return StorageError(str(error))

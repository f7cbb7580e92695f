"""The program around the commands: help, exit codes, errors, `--json`."""

import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Annotated

import pytest
import typer

from halfbyte import __version__, errors
from halfbyte.__main__ import SPINS, main
from halfbyte.cli import app
from halfbyte.cli.commands import COMMANDS, Command
from halfbyte.cli.output import current_output
from halfbyte.cli.parsing import example, new_app

HEAVY = ("torch", "numpy", "transformers", "pydantic", "matplotlib", "gguf", "safetensors")


def modules_imported_by(code: str) -> set[str]:
    code = f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_help_imports_no_parser_and_nothing_heavy() -> None:
    modules = modules_imported_by("from halfbyte.cli.app import run; assert run(['--help']) == 0")
    assert not modules & {*HEAVY, "typer", "rich"}


def test_importing_every_command_imports_nothing_heavy() -> None:
    names = ", ".join(command.module for command in COMMANDS.values())
    assert not modules_imported_by(f"import {names}") & {*HEAVY, "rich"}


def test_help_answers_at_once() -> None:
    # Measured 0.05 s, of one thread that waits for nothing; the promise is 0.3 s. Its time on the
    # processor, and the best of three, keep a busy machine out of it.
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "halfbyte", "--help"], check=True, stdout=subprocess.DEVNULL
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.3


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(arguments) == 0
    out = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in out
        assert command.help in out


def test_help_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["--json", "--help"]) == 0
    assert set(json.loads(capsys.readouterr().out)["commands"]) == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_has_an_example_and_the_common_options(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run([name, "--help"]) == 0
    out = capsys.readouterr().out
    if "COMMAND" not in out.splitlines()[0]:  # the options of a group are those of its commands
        assert "--json" in out
        assert "--debug" in out
    assert f"\n  halfbyte {name}" in out
    assert "Example" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["--version"]) == 0
    assert capsys.readouterr().out == f"halfbyte {__version__}\n"
    assert app.run(["--version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"version": __version__}


@pytest.fixture
def use_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """Make a function the command `probe`."""

    def use(function: Callable[..., object]) -> None:
        module = ModuleType("probe_command")
        module.app = new_app()  # type: ignore[attr-defined]
        module.app.command(epilog=example("halfbyte probe"))(function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(COMMANDS, "probe", Command(module.__name__, "For tests."))

    return use


EXIT_CODES = {
    errors.HalfbyteError: 1,
    errors.UsageError: 2,
    errors.ConfigError: 2,
    errors.FormatError: 1,
    errors.DataError: 1,
    errors.MissingFileError: 1,
    errors.MissingPackageError: 1,
    errors.UnsupportedError: 1,
    errors.BackendError: 1,
    errors.StorageError: 1,
    errors.VerificationError: 3,
    errors.DoesNotFitError: 4,
    errors.UnsafeArtifactError: 5,
}


def raise_it(error: BaseException) -> Callable[[], None]:
    def probe() -> None:
        raise error

    return probe


@pytest.mark.parametrize("kind", EXIT_CODES, ids=lambda kind: kind.__name__)
def test_an_error_decides_the_exit_code(
    kind: type[errors.HalfbyteError],
    use_command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_command(raise_it(kind("it went wrong", problems=["here", "there"], hint="Mend it.")))
    assert app.run(["probe"]) == EXIT_CODES[kind]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: it went wrong: 2 problems\n  here\n  there\nMend it.\n"


def test_an_error_as_json(
    use_command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    use_command(raise_it(errors.VerificationError("differs", problems=["a"], hint="Look.")))
    assert app.run(["probe", "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "error": {
            "code": "verification",
            "message": "differs",
            "problems": ["a"],
            "hint": "Look.",
            "exit_code": 3,
        }
    }
    assert captured.err.startswith("error: differs: 1 problem\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        pytest.param(KeyboardInterrupt(), 130, "", id="interrupt"),
        pytest.param(typer.Exit(75), 75, "", id="exit"),
        pytest.param(typer.Abort(), 130, "aborted", id="end-of-input"),
        pytest.param(MemoryError(), 4, "out of memory", id="memory"),
        pytest.param(MemoryError("4 GiB"), 4, "out of memory: 4 GiB", id="memory-with-reason"),
        pytest.param(PermissionError(13, "Permission denied", "/x"), 1, "'/x'", id="os"),
    ],
)
def test_other_ends(
    error: BaseException,
    code: int,
    message: str,
    use_command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_command(raise_it(error))
    assert app.run(["probe"]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback(
    use_command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    use_command(raise_it(errors.FormatError("bad bytes")))
    assert app.run(["probe", "--debug"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_fault_of_the_program_is_not_dressed_up(use_command: Callable[..., None]) -> None:
    use_command(raise_it(ZeroDivisionError("a fault")))
    with pytest.raises(ZeroDivisionError, match="a fault"):
        app.run(["probe"])


def test_common_options_stand_before_or_after_the_command(
    use_command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def probe(word: Annotated[str, typer.Argument()]) -> None:
        current_output().emit({"word": word, "number": float("nan")})
        current_output().text("for people")

    use_command(probe)
    for arguments in (["--json", "probe", "a"], ["probe", "--json", "a"], ["probe", "a", "--json"]):
        assert app.run(arguments) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out) == {"word": "a", "number": None}
        assert captured.err == "for people\n"
    assert app.run(["probe", "--", "--json"]) == 0
    assert capsys.readouterr().out == "for people\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["dcotor"], ["no such command 'dcotor'", "Did you mean `doctor`?"], id="typo"),
        pytest.param(["zzzz"], ["no such command 'zzzz'", "`halfbyte --help`"], id="unknown"),
        pytest.param(["--jason"], ["no such option '--jason'", "`--json`?"], id="option"),
        pytest.param(
            ["doctor", "--jsn"], ["--jsn", "--json", "`halfbyte doctor --help`"], id="its"
        ),
        pytest.param(["doctor", "extra"], ["extra", "`halfbyte doctor --help`"], id="argument"),
    ],
)
def test_usage_errors(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(arguments) == 2
    err = capsys.readouterr().err
    for word in words:
        assert word in err


def test_a_closed_pipe_ends_quietly() -> None:
    code = "import sys; from halfbyte.__main__ import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == app.CLOSED_PIPE


def test_the_module_runs_the_arguments_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module("halfbyte.__main__").main
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is put back
    monkeypatch.setattr(sys, "argv", ["halfbyte", "--version"])
    assert main() == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, SPINS),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_waiting_threads_soon_sleep_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: str | None
) -> None:
    monkeypatch.setattr(sys, "argv", ["halfbyte", "--version"])
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    assert main() == 0
    assert os.environ.get("GOMP_SPINCOUNT") == after

"""The commands: parse, call, print.

How to add a command, `frobnicate`:

1. Write `cli/frobnicate.py`. Import torch, and all of halfbyte that imports it, inside the
   function: the module itself must import in milliseconds (a test holds that).

       app = new_app()

       @app.command(epilog=example("halfbyte frobnicate MODEL --fast"))
       def frobnicate(model: Annotated[Path, typer.Argument(help="A model directory.")]) -> None:
           \"\"\"One line that says what it does.\"\"\"
           from halfbyte.models import frobnication

           report = frobnication.frobnicate(model)
           output = current_output()
           output.table(("tensor", "error"), report.rows())
           output.emit(report.to_json())

2. Add its line to `cli/commands.py`. Several commands under one word (`halfbyte data check`) are an
   app with several functions.

Every command then has `--json`, `--debug` and `--help`. Report failure by raising a
`HalfbyteError`: its class decides the exit code; `typer.Exit(75)` where an exit code is not an
error. Print through `output.current_output()` only, and show long work with
`progress.show_progress`. In tests, call `halfbyte.cli.app.run(["frobnicate", ...])`.
"""

"""Renders one chat template in a process that has nothing to lose. Run as a script.

A chat template is a program from a stranger. jinja2's sandbox keeps it from Python's
internals, but not from `{% set x = [x, x] %}` thirty times over, whose text is a gigabyte:
such work happens inside single C calls, which nothing in the same process can interrupt.
So the template runs here, under limits that the kernel enforces: memory, CPU time for each
rendering, and no more open files.

Speaks lines of JSON. First `{"template": ..., "variables": ...}`, answered by `{}`; then
lists of renderings, each answered by a list of `{"text": ...}`. A fault is `{"error": kind,
"message": ...}`. Imports only jinja2 and the standard library, to start in 60 ms.
"""

import contextlib
import json
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Environment, Template

# Far above what real templates need (microseconds, kilobytes).
CPU_SECONDS = 1.0
MAX_MEMORY = 512 << 20
MAX_CHARACTERS = 8 << 20
MAX_MESSAGE = 500
ALLOWED_FILES = 3  # stdin, stdout and stderr
EXIT_OUT_OF_MEMORY = 99


def sandbox() -> "Environment":
    """The environment templates are written for, as `transformers` defines it."""
    # jinja2 imports these when a template first needs them, which is too late.
    import textwrap  # noqa: F401, PLC0415
    from datetime import datetime  # noqa: PLC0415  (after the paths are set)

    from jinja2 import TemplateError, debug, nodes  # noqa: F401, PLC0415
    from jinja2.ext import Extension, loopcontrols  # noqa: PLC0415
    from jinja2.parser import Parser  # noqa: PLC0415
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    class Generation(Extension):
        """`{% generation %}` marks what the model says; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: object) -> NoReturn:
        raise TemplateError(str(message))

    def tojson(
        value: object,
        ensure_ascii: bool = False,  # noqa: FBT001, FBT002  (templates pass it by position)
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,  # noqa: FBT001, FBT002
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)  # noqa: DTZ005  (local time, as templates expect)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    # Python reads the time zone, codecs and some modules when they are first used: now, while
    # files can be opened.
    warm_up = "{{ '\\n' | trim | tojson }}{{ strftime_now('%c') }}{{ '%s' | format(1) }}"
    environment.from_string(warm_up).render()
    with contextlib.suppress(TemplateError):
        environment.from_string("{% if %}")
    return environment


def fault(error: Exception) -> dict[str, str]:
    """What went wrong, sorted into the kinds that the parent tells apart."""
    from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError  # noqa: PLC0415
    from jinja2.exceptions import SecurityError  # noqa: PLC0415

    if isinstance(error, (MemoryError, RecursionError, OverflowError)):
        kind = "limit"
    elif isinstance(error, SecurityError):
        kind = "unsafe"
    elif isinstance(error, TemplateSyntaxError):
        kind = "syntax"
    elif isinstance(error, TemplateError) and not isinstance(error, UndefinedError):
        kind = "refused"
    else:
        kind = "failed"
    message = f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
    line = getattr(error, "lineno", None)
    return {"error": kind, "message": message + (f" (line {line})" if line else "")}


def rendered(template: "Template", variables: dict[str, Any]) -> dict[str, str]:
    """One text, counted while it grows."""
    pieces, length = [], 0
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        for piece in template.generate(variables):
            length += len(piece)
            if length > MAX_CHARACTERS:
                message = f"more than {MAX_CHARACTERS} characters"
                return {"error": "limit", "message": message}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except Exception as error:  # noqa: BLE001  (whatever a template raises is its fault, not ours)
        return fault(error)


def reply(value: object) -> None:
    """Answer one line."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve the template of the first line until stdin ends."""
    sys.path[:0] = sys.argv[1:]
    environment = sandbox()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (ALLOWED_FILES, ALLOWED_FILES))
    # The default action ends the process, in the middle of a C call if need be.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    template: Template | None = None
    variables: dict[str, Any] = {}
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        request = json.loads(line)
        if template is None:
            variables = request["variables"]
            try:
                template = environment.from_string(request["template"])
            except Exception as error:  # noqa: BLE001  (compiling may raise nearly anything)
                reply(fault(error))
                return
            reply({})
        else:
            reply([rendered(template, variables | one) for one in request])
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        sys.exit(EXIT_OUT_OF_MEMORY)

"""What the demo learns from: functions of Python's standard library and what their docstrings say.

Any machine that runs the demo has them, and nobody has to be asked for them.
"""

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import DataError

INSTRUCTION = "Write a one-line docstring for this Python function."
TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "held_out.jsonl"

CODE_LENGTHS = range(40, 241)
"""Characters of a function without its docstring: long enough to say something, short enough to
be read, and learned from, in a demo."""

DOCSTRING_LENGTHS = range(15, 81)
NUM_HELD_OUT = 48
MAX_HELD_OUT_PER_MODULE = 4
MIN_TRAINED = 200

_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"})


@dataclass(frozen=True, slots=True)
class Function:
    """A documented function.

    Attributes:
        module: Where it is from, such as `email.message`.
        code: Its source, laid out anew, without docstring and comments.
        docstring: The first paragraph of its docstring, on one line.
    """

    module: str
    code: str
    docstring: str

    def as_row(self) -> str:
        """A line of JSON in the format `messages`."""
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": self.code},
            {"role": "assistant", "content": self.docstring},
        ]
        return json.dumps({"messages": messages}) + "\n"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Functions to learn from, and functions of other modules to be judged by."""

    trained: tuple[Function, ...]
    held_out: tuple[Function, ...]

    def write(self, directory: Path) -> None:
        """Write `train.jsonl` and `held_out.jsonl`."""
        for name, functions in ((TRAIN_FILE, self.trained), (HELD_OUT_FILE, self.held_out)):
            (directory / name).write_text("".join(f.as_row() for f in functions))


def collect_pairs(library: Path | None = None) -> Pairs:
    """Documented functions of the standard library, divided by module.

    Of two with the same code or docstring only the first is taken. Whole modules are held out,
    in the order of a hash of their names, so that no neighbour of a held-out function was seen.

    Args:
        library: Where the modules are; by default those of the Python that runs.

    Raises:
        DataError: There are too few.
    """
    library = Path(sysconfig.get_path("stdlib")) if library is None else library
    modules: dict[str, list[Function]] = {}
    for function in _distinct(_functions(library)):
        modules.setdefault(function.module, []).append(function)
    held_out: list[Function] = []
    trained: list[Function] = []
    for name in sorted(modules, key=_hash):
        if len(held_out) < NUM_HELD_OUT:
            held_out += sorted(modules[name], key=lambda f: _hash(f.code))[:MAX_HELD_OUT_PER_MODULE]
        else:
            trained += modules[name]
    if len(trained) < MIN_TRAINED:
        raise DataError(
            f"{library}: {MIN_TRAINED} documented functions expected to learn from, "
            f"found {len(trained)}",
            hint="A Python whose standard library is there as source files has thousands.",
        )
    held_out.sort(key=lambda f: _hash(f.code))
    return Pairs(tuple(trained), tuple(held_out[:NUM_HELD_OUT]))


def _functions(library: Path) -> Iterator[Function]:
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts):
            module = ".".join(part for part in parts if part != "__init__")
            yield from _functions_of(path, module)


def _functions_of(path: Path, module: str) -> Iterator[Function]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of old escapes in strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and the like
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) == 1:
            continue
        docstring = ast.get_docstring(node) or ""
        summary = " ".join(docstring.split("\n\n")[0].split())
        if len(summary) in DOCSTRING_LENGTHS:
            node.body = node.body[1:]
            code = ast.unparse(node)
            if len(code) in CODE_LENGTHS:
                yield Function(module, code, summary)


def _distinct(functions: Iterable[Function]) -> Iterator[Function]:
    seen: set[str] = set()
    for function in functions:
        keys = {function.code, function.docstring.casefold()}
        if seen.isdisjoint(keys):
            seen |= keys
            yield function


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()

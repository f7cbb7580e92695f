"""`halfbyte inspect`: what a file or directory is, in plain words, without loading it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.output import current_output
from halfbyte.cli.parsing import example, new_app
from halfbyte.errors import FormatError, MissingFileError, UnsupportedError

if TYPE_CHECKING:
    from halfbyte.cli.inspection import Inspection

GGUF_MAGIC = b"GGUF"
ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"

app = new_app()


@app.command(
    epilog=example("halfbyte inspect models/smollm2-nf4", "halfbyte inspect adapter --tensors")
)
def inspect(
    path: Annotated[Path, typer.Argument(help="A directory or file.", show_default=False)],
    *,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Explain a model, adapter, stack, checkpoint or run, or a safetensors or GGUF file.

    Reads headers and small JSON files only: it costs neither memory nor trust. What does not agree
    or cannot be known is said on lines that begin with an exclamation mark.
    """
    output = current_output()
    inspection = inspect_path(path)
    inspection.show(output, tensors=tensors)
    output.emit(inspection.to_json(tensors=tensors))


def inspect_path(path: Path) -> "Inspection":
    """Find out what a path is and explain it.

    Raises:
        MissingFileError: There is nothing.
        UnsupportedError: It is something that is not looked into.
        FormatError, UnsafeArtifactError, StorageError: It is not what it says.
    """
    if not path.exists():
        raise MissingFileError(f"{path}: there is no such file or directory")
    return _inspect_directory(path) if path.is_dir() else _inspect_file(path)


def _inspect_directory(path: Path) -> "Inspection":
    from halfbyte.adapters.stack_files import is_stack
    from halfbyte.cli import inspect_adapter, inspect_model, inspect_run, inspect_stack

    if is_stack(path):
        return inspect_stack.inspect_stack(path)
    if (path / inspect_adapter.CONFIG).exists() and not inspect_run.is_checkpoint(path):
        return inspect_adapter.inspect_adapter(path)
    if inspect_run.is_checkpoint(path):
        return inspect_run.inspect_checkpoint(path)
    if inspect_run.is_run(path):
        return inspect_run.inspect_run(path)
    if inspect_model.is_model(path):
        return inspect_model.inspect_model(path)
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FormatError(
        f"{path}: a model, adapter, stack, checkpoint or run expected, found {found}",
        hint="Each is known by a file: config.json or model.safetensors, adapter_config.json, "
        "stack.json, MANIFEST.json, metrics.jsonl.",
    )


def _inspect_file(path: Path) -> "Inspection":
    from halfbyte.cli.inspect_gguf import inspect_gguf
    from halfbyte.cli.inspect_model import inspect_safetensors
    from halfbyte.storage.files import open_regular, read_exactly

    with open_regular(path) as (descriptor, status):
        begin = read_exactly(descriptor, min(4, status.st_size), 0, path)
    if begin == GGUF_MAGIC:
        return inspect_gguf(path)
    if begin == ZIP_MAGIC or begin[:1] == PICKLE_MAGIC:
        raise UnsupportedError(
            f"{path}: a pickle, and opening one runs code: not looked into",
            hint="`halfbyte quantize` reads PyTorch checkpoints, weights only.",
        )
    return inspect_safetensors(path)

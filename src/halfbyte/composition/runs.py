"""`hb.train` and `hb.resume`: a run, and where `output.merge` asks for it, its standalone model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from halfbyte.composition.merge import merge
from halfbyte.training import api, run
from halfbyte.training.config_file import load_config
from halfbyte.training.progress import Observer
from halfbyte.training.run import CONFIG_FILE, RunResult

MERGED_DIRECTORY = "merged"


def train(
    *,
    model: str | Path | None = None,
    data: str | Path | Mapping[str, object] | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    observer: Observer | None = None,
    **sections: Mapping[str, object],
) -> RunResult:
    """Fine-tune a model; see `training.api.train` for the arguments.

    Raises:
        HalfbyteError: See there.
        MergeRefusedError: The merge is beyond its limits; the adapter is written.
    """
    result = api.train(
        model=model, data=data, out=out, config=config, observer=observer, **sections
    )
    return merge_result(result)


def resume(directory: str | Path, observer: Observer | None = None) -> RunResult:
    """Take a run up again behind its newest valid checkpoint; see `training.run.resume`."""
    return merge_result(run.resume(directory, observer))


def merge_result(result: RunResult) -> RunResult:
    """Write `merged` beside the adapter of a finished run, if its config asks for it.

    The training data is the calibration text and the evaluation data, if it is a file of its own,
    the text that the merge is judged by.

    Raises:
        MergeRefusedError: The merge is beyond its limits; the report says how far.
        StorageError: The disk is full.
    """
    if result.result is None:
        return result
    config = load_config(result.directory / CONFIG_FILE)
    if config.output.merge == "none":
        return result
    merged = merge(
        config.model,
        result.result,
        out=result.directory / MERGED_DIRECTORY,
        dtype=config.output.merge,
        calibration=config.data.train if config.output.merge == "nf4" else None,
        probe=config.data.eval,
        data_format=config.data.format,
        replace=True,
    )
    return replace(result, merged=merged.path)

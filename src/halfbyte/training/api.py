"""`hb.train`: a run from Python, with the names of the config."""

from collections.abc import Mapping
from pathlib import Path

from halfbyte.errors import UsageError
from halfbyte.training.config_file import load_config
from halfbyte.training.progress import Observer
from halfbyte.training.run import RunResult
from halfbyte.training.run import train as start


def train(
    *,
    model: str | Path | None = None,
    data: str | Path | Mapping[str, object] | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    observer: Observer | None = None,
    **sections: Mapping[str, object],
) -> RunResult:
    """Fine-tune a model.

    Args:
        model: The model directory.
        data: Training data, or the whole `data` section.
        out: The run directory; must be new.
        config: A YAML file; what is given here wins over it.
        observer: Told of every event.
        sections: Other sections by name: `lora={"rank": 16}`, `training={"max_steps": 100}`.

    Raises:
        UsageError: A section is not a mapping.
        ConfigError, DataError, FormatError, MissingFileError, StorageError: Before any compute.
        TrainingError: A step was not finite and `training.on_nan` is `stop`.
    """
    flags: dict[str, object] = {
        "model": None if model is None else str(model),
        "output.dir": None if out is None else str(out),
    }
    if isinstance(data, Mapping):
        sections["data"] = data
    elif data is not None:
        flags["data.train"] = str(data)
    for section, settings in sections.items():
        if not isinstance(settings, Mapping):
            raise UsageError(f"{section}: a mapping of settings expected, found {settings!r}")
        flags |= {f"{section}.{name}": value for name, value in settings.items()}
    return start(load_config(config, flags=flags), observer)

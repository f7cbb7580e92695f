"""The configuration of a run from a command line."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halfbyte.training.config import Config


def read_run_config(
    arguments: Sequence[str],
    options: Mapping[str, str | None],
    *,
    default_out: str | None = None,
) -> "Config":
    """A config file, `key=value` settings that win over it, and options that win over both.

    Args:
        arguments: The file first, unless it is a setting already; then settings.
        options: Name of a setting -> what the option says; None where it was not given.
        default_out: The run directory when nothing names one.

    Raises:
        MissingFileError: There is no such file.
        ConfigError: Lists every fault.
    """
    from halfbyte.training.config_file import load_config

    file, settings = None, list(arguments)
    if settings and "=" not in settings[0]:
        file, *settings = settings
    if default_out is not None and file is None:
        settings.insert(0, f"output.dir={default_out}")
    return load_config(file, settings, options)

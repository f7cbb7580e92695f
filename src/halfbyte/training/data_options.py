"""From the `data` section of a config to what reads the data."""

from halfbyte.data.formats import parse_format
from halfbyte.data.options import DataOptions, Overlong
from halfbyte.training.config import DataSection


def data_options(section: DataSection) -> DataOptions:
    """How the section wants rows to be read."""
    return DataOptions(
        format=parse_format(section.format),
        max_length=section.max_length,
        overlong=Overlong(section.overlong),
        train_on_prompt=section.train_on_prompt,
    )

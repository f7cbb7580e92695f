"""The config's words for data are those of the data package."""

import typing

from halfbyte.data.formats import Format
from halfbyte.data.options import DataOptions, Overlong
from halfbyte.training.config import DataFormat, DataSection
from halfbyte.training.data_options import data_options


def test_the_config_knows_every_format() -> None:
    assert set(typing.get_args(DataFormat)) == {"auto", *Format}


def test_defaults() -> None:
    expected = DataOptions(None, 2048, Overlong.REFUSE, train_on_prompt=False)
    assert data_options(DataSection(train="x")) == expected


def test_every_setting_arrives() -> None:
    section = DataSection(
        train="x", format="alpaca", max_length=7, overlong="drop", train_on_prompt=True
    )
    expected = DataOptions(Format.ALPACA, 7, Overlong.DROP, train_on_prompt=True)
    assert data_options(section) == expected

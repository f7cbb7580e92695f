"""Every setting of a run with its default and its meaning, read off the config itself."""

import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from halfbyte.training.config import Config


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        name: As in `key=value`, such as `lora.rank`.
        needed: Whether it has no default.
        default: As in a YAML file; empty when it is needed.
        choices: The names that it can be, or none if it is something else.
        meaning: What it does.
    """

    name: str
    needed: bool
    default: str
    choices: tuple[str, ...]
    meaning: str


def describe_settings(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[Setting]:
    """The settings of a section, in the order of the config."""
    for key, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from describe_settings(inner, f"{prefix}{key}.")
            continue
        needed = field.is_required()
        default = "" if needed else _as_yaml(field.get_default(call_default_factory=True))
        meaning = " ".join((field.description or "").split())
        yield Setting(prefix + key, needed, default, _choices_of(field), meaning)


def _choices_of(field: FieldInfo) -> tuple[str, ...]:
    if typing.get_origin(field.annotation) is typing.Literal:
        return typing.get_args(field.annotation)
    return ()


def _as_yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)

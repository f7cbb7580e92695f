"""Optimizer state under flat names, as a checkpoint file holds it."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from halfbyte.formats.checks import describe, dtype_name
from halfbyte.formats.safetensors_writer import TensorSpec
from halfbyte.memory.layout import Field
from halfbyte.optim.stores import Store

STEP = "step"
"""Steps taken with a parameter, float32 `[]`, as PyTorch counts them."""


class StateTensors(Mapping[str, Tensor]):
    """The state of an optimizer, each tensor read from its store when asked for.

    Shapes and dtypes are known without reading: see `specs`. Resident state is given as it is,
    not copied: use it before the next step.
    """

    def __init__(self, store: Store, params: Mapping[str, tuple[int, torch.Size, Tensor]]) -> None:
        """`params` holds, by name: the item in the store, the parameter's shape, its step."""
        self._store = store
        self._params = dict(params)
        self._last: tuple[int, tuple[Tensor, ...]] | None = None

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor, in the order of the state."""
        return {
            f"{name}.{key}": spec
            for name, (item, shape, _) in self._params.items()
            for key, spec in self._specs_of(item, shape).items()
        }

    def __getitem__(self, key: str) -> Tensor:
        name, field = split_name(key)
        if name not in self._params:
            raise KeyError(key)
        item, shape, step = self._params[name]
        if field == STEP:
            return step
        for number, each in enumerate(self._store.items[item].fields):
            if each.name == field:
                value = self._read(item)[number]
                return value.view(shape) if each.elements == 1 else value
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs())

    def __len__(self) -> int:
        return len(self.specs())

    def _specs_of(self, item: int, shape: torch.Size) -> dict[str, TensorSpec]:
        specs = {}
        for field in self._store.items[item].fields:
            specs[field.name] = TensorSpec(field.dtype, _field_shape(field, shape))
        specs[STEP] = TensorSpec(torch.float32, ())
        return specs

    def _read(self, item: int) -> tuple[Tensor, ...]:
        """The fields of an item; those of the last one asked for are kept, as they come in turn."""
        if self._last is None or self._last[0] != item:
            self._last = item, self._store.read(item)
        return self._last[1]


def split_name(key: str) -> tuple[str, str]:
    """The parameter's name and the field's: the last dot is between them."""
    name, _, field = key.rpartition(".")
    return name, field


def check_state(
    name: str, shape: torch.Size, fields: tuple[Field, ...], found: Mapping[str, Tensor]
) -> list[str]:
    """What keeps the state found for one parameter from being taken over."""
    expected = {field.name: (field.dtype, _field_shape(field, shape)) for field in fields}
    problems = [f"{name}.{key}: not expected" for key in found if key not in {*expected, STEP}]
    for key, (dtype, wanted) in expected.items():
        if key not in found:
            problems.append(f"{name}.{key}: missing")
        elif found[key].dtype != dtype or tuple(found[key].shape) != wanted:
            problems.append(
                f"{name}.{key}: {dtype_name(dtype)} {list(wanted)} expected, "
                f"found {describe(found[key])}"
            )
    if STEP not in found:
        problems.append(f"{name}.{STEP}: missing")
    elif found[STEP].numel() != 1 or not found[STEP].item() >= 0:
        problems.append(f"{name}.{STEP}: one number, 0 or more, expected")
    return problems


def _field_shape(field: Field, shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape) if field.elements == 1 else (field.count(shape.numel()),)

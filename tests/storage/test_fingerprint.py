"""A fingerprint depends on names, dtypes, shapes and values, and on nothing else."""

import hashlib
import struct
import sys
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError, UsageError
from halfbyte.storage.fingerprint import Fingerprint, fingerprint_tensors


def number(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def test_the_definition_byte_by_byte() -> None:
    tensors = {"b": torch.tensor([[1.0, -2.0]]), "ä": torch.tensor(7, dtype=torch.uint8)}
    expected = (
        (b"halfbyte tensors 1\n" + number(2))
        + (number(1) + b"b" + number(7) + b"float32" + number(2, 1, 2, 8))
        + struct.pack("<2f", 1.0, -2.0)
        + (number(2) + "ä".encode() + number(5) + b"uint8" + number(0, 1) + b"\x07")
    )
    assert fingerprint_tensors(tensors) == hashlib.sha256(expected).hexdigest()


def test_order_device_and_strides_do_not_matter() -> None:
    a, b = torch.randn(3, 4), torch.ones(2).bfloat16()
    assert fingerprint_tensors({"a": a, "b": b}) == fingerprint_tensors(
        {"b": b, "a": a.T.clone().T}
    )


BASE = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(3, 2), "b": torch.zeros(4)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(4)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([0, 0, 0, -0.0])},
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(0)},
    ],
)
def test_everything_else_matters(other: dict[str, Tensor]) -> None:
    assert fingerprint_tensors(other) != fingerprint_tensors(BASE)


def test_tensors_are_taken_one_at_a_time() -> None:
    alive: list[str] = []

    class Lazy(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            alive.append(name)
            return BASE[name]

        def __iter__(self) -> Iterator[str]:
            return iter(reversed(BASE))

        def __len__(self) -> int:
            return len(BASE)

    assert fingerprint_tensors(Lazy()) == fingerprint_tensors(BASE)
    assert alive == ["a", "b"]


def test_big_endian_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(UnsupportedError, match="little-endian"):
        fingerprint_tensors(BASE)


def test_tensors_may_come_one_at_a_time_in_order() -> None:
    a, b = torch.zeros(2), torch.ones(3)
    stepwise = Fingerprint(2)
    with pytest.raises(UsageError, match="2 tensors are missing"):
        stepwise.hexdigest()
    stepwise.add("a", a)
    for name in ("a", "A"):
        with pytest.raises(UsageError, match="out of order"):
            stepwise.add(name, b)
    stepwise.add("b", b)
    assert stepwise.hexdigest() == fingerprint_tensors({"b": b, "a": a})
    with pytest.raises(UsageError, match="one too many"):
        stepwise.add("c", a)

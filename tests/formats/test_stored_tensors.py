"""Headers of 4-bit weights against what their description asks for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.errors import FormatError
from halfbyte.formats.bitsandbytes_layout import to_bitsandbytes
from halfbyte.formats.double_quantization import DoubleQuantized, double_quantize
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.formats.stored_tensors import StoredTensor, format_bits, list_stored_tensors

STATE = "w.quant_state.bitsandbytes__nf4"


def listed(tensors: dict[str, Tensor], path: Path) -> list[StoredTensor]:
    write_safetensors(path / "x.safetensors", tensors)
    file = SafetensorsFile.open(path / "x.safetensors")
    return list_stored_tensors({name: (file, entry) for name, entry in file.entries.items()})


def parts(**options: object) -> dict[str, Tensor]:
    return to_bitsandbytes("w", hb.quantize(torch.ones(33, 100), **options))


def test_a_4_bit_weight_is_one_tensor(tmp_path: Path) -> None:
    tensors = parts()
    tensors["w2"] = torch.zeros(2, 3, dtype=torch.float16)
    weight, other = listed(tensors, tmp_path)
    assert (weight.name, weight.stored, weight.shape) == ("w", "nf4", (33, 100))
    assert weight.num_elements == 3300
    assert weight.double_quantized
    assert weight.nbytes == sum(t.nbytes for name, t in tensors.items() if name != "w2")
    assert other == StoredTensor("w2", "float16", (2, 3), 6, 12)
    assert format_bits([other]) == 0.0
    assert format_bits([weight, other]) == hb.quantize(torch.ones(33, 100)).bits_per_element


def test_another_nested_block_size(tmp_path: Path) -> None:
    q = hb.quantize(torch.ones(64, 640), double_quant=False)
    assert isinstance(q.stored_scales, Tensor)
    nested = double_quantize(q.stored_scales, block_size=64)
    assert isinstance(nested, DoubleQuantized)
    q = replace(q, stored_scales=nested)
    (weight,) = listed(to_bitsandbytes("w", q), tmp_path)
    assert format_bits([weight]) == q.bits_per_element


def change(name: str, tensor: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(change("w", None), "its codes are missing", id="no-codes"),
        pytest.param(change("w.absmax", None), "w.absmax: missing", id="no-scales"),
        pytest.param(change("w.nested_absmax", None), "w.nested_absmax: missing", id="no-nested"),
        pytest.param(
            change("w.zero_points", torch.zeros(52)), "w.zero_points: not expected", id="more"
        ),
        pytest.param(
            change("w.absmax", torch.zeros(52)),
            r"w.absmax: uint8 of 52 bytes expected, found float32 of 208",
            id="dtype",
        ),
        pytest.param(
            change("w", torch.zeros(7, 1, dtype=torch.uint8)),
            "w: uint8 of 1650 bytes expected, found uint8 of 7",
            id="short-codes",
        ),
        pytest.param(
            change(STATE, torch.zeros(1 << 20, dtype=torch.uint8)),
            "at most 9999 bytes expected, found 1048576",
            id="huge-state",
        ),
        pytest.param(
            change(STATE, torch.tensor(list(b"{}"), dtype=torch.uint8)),
            "blocksize: missing",
            id="empty-state",
        ),
        pytest.param(
            change(STATE, torch.tensor(list(b"{"), dtype=torch.uint8)), "not JSON", id="no-json"
        ),
    ],
)
def test_parts_that_do_not_fit(
    damage: Callable[[dict[str, Tensor]], None], words: str, tmp_path: Path
) -> None:
    tensors = parts()
    damage(tensors)
    with pytest.raises(FormatError, match=words):
        listed(tensors, tmp_path)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("book", ["nf4", "int4_affine"])
def test_plain_scales_and_zero_points(tmp_path: Path, book: str, double_quant: bool) -> None:
    q = hb.quantize(torch.ones(33, 100), book, double_quant=double_quant)
    (weight,) = listed(to_bitsandbytes("w", q), tmp_path)
    assert weight.double_quantized == double_quant
    assert format_bits([weight]) == q.bits_per_element
    assert weight.to_json() == {
        "name": "w",
        "stored": book,
        "shape": [33, 100],
        "num_elements": 3300,
        "bytes": weight.nbytes,
    }

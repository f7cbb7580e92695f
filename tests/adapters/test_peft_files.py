"""Adapter directories, with PEFT as the oracle in both directions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte.adapters.adapter import Adapter, LoraUpdate, check_adapter_fits
from halfbyte.adapters.peft_files import peft_config, read_adapter, write_adapter
from halfbyte.errors import FormatError, MissingFileError, StorageError, UnsupportedError

peft = pytest.importorskip("peft")

SHAPES = {"layers.0.q_proj": (24, 16), "layers.0.up": (40, 16), "layers.1.q_proj": (24, 16)}


class Stack(nn.Module):
    """Two layers whose names look like a decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, object] = {}  # PEFT looks here for a model type
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(16, 24), "up": nn.Linear(16, 40)}) for _ in range(2)
        )

    def prepare_inputs_for_generation(self) -> None:
        """PEFT wants it of whatever it adapts as a causal language model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([m(x) for layer in self.layers for m in layer.values()], dim=-1)


def update(path: str, rank: int, alpha: float = 8.0, *, use_rslora: bool = False) -> LoraUpdate:
    generator = torch.Generator().manual_seed(rank)
    num_outputs, num_inputs = SHAPES[path]
    a = torch.randn(rank, num_inputs, generator=generator)
    return LoraUpdate(a, torch.randn(num_outputs, rank, generator=generator), alpha, use_rslora)


def adapter(*, use_rslora: bool = False) -> Adapter:
    ranks = dict(zip(SHAPES, (4, 8, 4), strict=True))
    modules = {
        path: update(path, rank, 8.0 if rank == 4 else 20.5, use_rslora=use_rslora)
        for path, rank in ranks.items()
    }
    return Adapter(modules, base_model="models/base", dropout=0.05, provenance={"data": "x"})


def deltas(found: Mapping[str, LoraUpdate]) -> dict[str, torch.Tensor]:
    return {path: f.scaling * f.b_OR @ f.a_RI for path, f in found.items()}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_is_written_reads_back(tmp_path: Path, use_rslora: bool) -> None:
    original = adapter(use_rslora=use_rslora)
    write_adapter(original, tmp_path / "a")
    back = read_adapter(tmp_path / "a")
    assert (back.base_model, back.dropout, back.provenance) == ("models/base", 0.05, {"data": "x"})
    assert back.num_parameters == original.num_parameters
    for path, factors in original.modules.items():
        assert torch.equal(back.modules[path].a_RI, factors.a_RI)
        assert torch.equal(back.modules[path].b_OR, factors.b_OR)
        assert back.modules[path].scaling == factors.scaling


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_ours(tmp_path: Path, use_rslora: bool) -> None:
    original = adapter(use_rslora=use_rslora)
    write_adapter(original, tmp_path / "a")
    base = Stack()
    x = torch.randn(3, 16)
    expected = base(x).detach()
    for path, delta in deltas(original.modules).items():
        offset = {"layers.0.q_proj": 0, "layers.0.up": 24, "layers.1.q_proj": 64}[path]
        expected[:, offset : offset + delta.shape[0]] += x @ delta.T
    model = peft.PeftModel.from_pretrained(base, tmp_path / "a")
    # float32 sums of at most 16 products in two orders
    torch.testing.assert_close(model.base_model.model(x).detach(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ours_loads_what_peft_wrote(tmp_path: Path, use_rslora: bool) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up"],
        rank_pattern={r"layers\.1\.up": 6},
        alpha_pattern={"q_proj": 3},
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(Stack(), config)
    model.save_pretrained(tmp_path / "a")
    back = read_adapter(tmp_path / "a")
    for path, delta in deltas(back.modules).items():
        theirs = model.base_model.model.get_submodule(path).get_delta_weight("default")
        torch.testing.assert_close(delta, theirs, rtol=1e-6, atol=1e-6)
    assert len(back.modules) == 4
    assert back.modules["layers.1.up"].rank == 6


def test_endings_are_written_only_where_they_select_the_same_layers() -> None:
    whole = {path: update(path, 4) for path in SHAPES}
    assert peft_config(Adapter(whole), list(SHAPES))["target_modules"] == ["q_proj", "up"]
    part = {path: f for path, f in whole.items() if path != "layers.1.q_proj"}
    assert peft_config(Adapter(part), list(SHAPES))["target_modules"] == sorted(part)
    assert peft_config(Adapter(whole))["target_modules"] == sorted(whole)


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


UNSUPPORTED = [
    {"use_dora": True},
    {"bias": "all"},
    {"modules_to_save": ["lm_head"]},
    {"fan_in_fan_out": True},
    {"peft_type": "IA3"},
    {"init_lora_weights": "pissa_niter_4"},
    {"layer_replication": [[0, 1]]},
]


@pytest.mark.parametrize("changes", UNSUPPORTED, ids=lambda c: next(iter(c)))
def test_more_than_plain_lora_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_adapter(adapter(), tmp_path / "a")
    edit(tmp_path / "a", **changes)
    with pytest.raises(UnsupportedError, match=next(iter(changes))):
        read_adapter(tmp_path / "a")


BROKEN = [
    ({"r": 5}, "rank 5 in"),
    ({"r": "4"}, "r: a number expected"),
    ({"r": 0.5}, "a positive integer expected"),
    ({"lora_alpha": float("nan")}, "NaN|number expected"),
    ({"rank_pattern": []}, None),
    ({"rank_pattern": [1]}, "an object expected"),
    ({"rank_pattern": {"(a+)+b": 3}}, "too complex"),
    ({"rank_pattern": {"a" * 300: 3}}, "too complex"),
    ({"lora_dropout": True}, "lora_dropout: a number expected"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN, ids=str)
def test_contradictions_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    write_adapter(Adapter({"layers.0.up": update("layers.0.up", 4)}), tmp_path / "a")
    edit(tmp_path / "a", **changes)
    if message is None:
        assert read_adapter(tmp_path / "a").modules["layers.0.up"].rank == 4
        return
    with pytest.raises(FormatError, match=message):
        read_adapter(tmp_path / "a")


def test_every_faulty_tensor_is_listed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    write_adapter(adapter(), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.layers"
    del tensors[f"{prefix}.0.q_proj.lora_B.weight"]
    tensors[f"{prefix}.1.q_proj.lora_A.weight"][0, 0] = float("nan")
    tensors[f"{prefix}.0.up.lora_B.weight"] = torch.zeros(40, 7)
    tensors["surprise"] = torch.zeros(1)
    save_file(tensors, path)
    with pytest.raises(FormatError, match="4 problems") as caught:
        read_adapter(tmp_path / "a")
    for part in ("q_proj.lora_B: missing", "lora_A: holds NaN", "ranks differ", "surprise: "):
        assert part in str(caught.value)


def test_an_adapter_without_factors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415

    write_adapter(adapter(), tmp_path / "a")
    save_file({}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="no factors"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_adapter(adapter(), tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    with pytest.raises(MissingFileError, match=name):
        read_adapter(tmp_path / "a")


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    write_adapter(adapter(), tmp_path / "a")
    with pytest.raises(StorageError):
        write_adapter(adapter(), tmp_path / "a")
    write_adapter(adapter(use_rslora=True), tmp_path / "a", replace=True)
    assert read_adapter(tmp_path / "a").modules["layers.0.up"].use_rslora


def test_fitting_lists_every_mismatch() -> None:
    linears = {"layers.0.q_proj": (24, 16), "layers.0.up": (41, 17)}
    with pytest.raises(FormatError, match="3 problems") as caught:
        check_adapter_fits(adapter(), linears, name="runs/a")
    text = str(caught.value)
    assert "layers.1.q_proj: the base model has no such linear layer" in text
    assert "layers.0.up.lora_A: shape [8, 16], base model needs [8, 17]" in text
    assert "layers.0.up.lora_B: shape [40, 8], base model needs [41, 8]" in text
    check_adapter_fits(adapter(), SHAPES, name="a")
    with pytest.raises(FormatError, match="no layers"):
        check_adapter_fits(Adapter({}), SHAPES, name="a")


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(2, 5), "ranks differ"),
        (torch.zeros(4), torch.zeros(2, 4), "lora_A: a float32 matrix"),
        (torch.zeros(4, 3), torch.zeros(2, 4).half(), "lora_B: a float32 matrix"),
    ],
)
def test_an_update_is_two_matrices(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        LoraUpdate(a, b, 1.0)

"""LoRA layers in foreign modules, against dense autograd and against PEFT on bitsandbytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte.adapters.modules import AdaptedLinear, attach
from halfbyte.errors import ConfigError, FormatError, UsageError

# float32 sums of up to 64 products in another order, through two layers.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Tower(nn.Module):
    """Two linears and something that is not one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.second = nn.Linear(96, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


@pytest.fixture
def tower() -> Tower:
    torch.manual_seed(0)
    return Tower()


def randomize(module: nn.Module) -> None:
    """B starts at zero: without this nothing would show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, AdaptedLinear):
                layer.lora_B.normal_(std=0.1, generator=generator)


def test_attaching_in_16_bits_changes_nothing_yet(tower: Tower) -> None:
    x = torch.randn(2, 5, 64)
    before = tower(x).detach()
    attached = attach(tower, {"rank": 4}, codebook=None)
    assert torch.equal(tower(x).detach(), before)
    assert set(attached.layers) == {"first", "second"}
    assert attached.num_parameters == 4 * (64 + 96 + 96 + 32)


def test_only_the_factors_are_trainable_and_in_the_state(tower: Tower) -> None:
    attached = attach(tower, {"rank": 4, "targets": ["second"]})
    trainable = {n for n, p in tower.named_parameters() if p.requires_grad}
    assert trainable == {"second.lora_A", "second.lora_B"}
    assert {id(p) for p in attached.parameters()} == {id(p) for p in tower.second.parameters()}
    assert isinstance(tower.first, nn.Linear)


@pytest.mark.parametrize("codebook", ["nf4", "fp4", None])
def test_outputs_and_gradients_equal_dense_autograd(tower: Tower, codebook: str | None) -> None:
    attached = attach(tower, {"rank": 4, "alpha": 12}, codebook=codebook)
    randomize(tower)
    x = torch.randn(3, 7, 64, requires_grad=True)
    layer = attached.layers["first"]
    weight = layer.weight if isinstance(layer.weight, torch.Tensor) else layer.weight.dequantize()
    bias = layer._bias
    ours = layer(x)
    ours.square().sum().backward()
    found = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
    leaves = [t.detach().clone().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    y = leaves[0] @ weight.T + bias + 3 * (leaves[0] @ leaves[1].T) @ leaves[2].T
    torch.testing.assert_close(ours, y, **TOLERANCE)
    y.square().sum().backward()
    for gradient, leaf in zip(found, leaves, strict=True):
        scale = leaf.grad.abs().max()
        torch.testing.assert_close(gradient / scale, leaf.grad / scale, **TOLERANCE)


def test_autocast_decides_the_dtype(tower: Tower) -> None:
    attach(tower, {"rank": 4})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tower(torch.randn(2, 64)).dtype == torch.bfloat16
    assert tower(torch.randn(2, 64)).dtype == torch.float32


def test_converting_the_module_keeps_factors_in_float32(tower: Tower) -> None:
    attached = attach(tower, {"rank": 4})
    tower.bfloat16()
    assert {p.dtype for p in attached.parameters()} == {torch.float32}
    assert tower(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dropout_acts_in_training_only_and_repeats_under_checkpointing(tower: Tower) -> None:
    attach(tower, {"rank": 4, "dropout": 0.5, "targets": ["first"]}, codebook=None)
    randomize(tower)
    x = torch.randn(4, 64)
    plain = tower.eval()(x)
    assert torch.equal(tower(x), plain)
    tower.train()
    assert not torch.equal(tower(x), plain)
    torch.manual_seed(3)
    tower(x).sum().backward()
    expected = tower.first.lora_A.grad.clone()
    tower.first.lora_A.grad = None
    torch.manual_seed(3)
    torch.utils.checkpoint.checkpoint(tower, x, use_reentrant=False).sum().backward()
    assert torch.equal(tower.first.lora_A.grad, expected)


def test_an_empty_input_gives_an_empty_output(tower: Tower) -> None:
    attach(tower, {"rank": 4})
    assert tower(torch.empty(0, 64)).shape == (0, 32)


def test_saving_and_loading(tower: Tower, tmp_path: Path) -> None:
    attached = attach(tower, {"rank": 4, "rank_pattern": {"second": 2}})
    randomize(tower)
    attached.save(tmp_path / "a", base_model="tower")
    torch.manual_seed(0)
    other = Tower()
    again = attach(other, {"rank": 4, "rank_pattern": {"second": 2}})
    again.load(tmp_path / "a")
    x = torch.randn(2, 64)
    assert torch.equal(other(x), tower(x))
    wrong = attach(Tower(), {"rank": 4})
    with pytest.raises(ConfigError, match=r"second: rank 4 .* found rank 2"):
        wrong.load(tmp_path / "a")
    less = attach(Tower(), {"rank": 4, "targets": ["first"]})
    with pytest.raises(FormatError, match="second: the base model has no such"):
        less.load(tmp_path / "a")


def test_faults_leave_the_module_as_it_was(tower: Tower) -> None:
    with pytest.raises(ConfigError, match=r"no nn\.Linear"):
        attach(nn.LayerNorm(3))
    with pytest.raises(ConfigError, match="matches no linear"):
        attach(tower, {"targets": ["third"]})
    with torch.no_grad():
        tower.second.weight[3, 5] = float("nan")
    with pytest.raises(FormatError, match=r"second holds 1 NaN .* index \[3, 5\]"):
        attach(tower)
    assert isinstance(tower.first, nn.Linear)
    assert tower.first.weight.requires_grad


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_step_has_the_gradients_of_peft_on_bitsandbytes() -> None:
    peft = pytest.importorskip("peft")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours, theirs = tiny_llama(), tiny_llama()
    for name, part in list(theirs.named_modules()):
        if isinstance(part, nn.Linear) and name != "lm_head":
            layer = bitsandbytes.nn.Linear4bit(
                part.in_features,
                part.out_features,
                bias=False,
                compute_dtype=torch.float32,
                quant_type="nf4",
                compress_statistics=False,  # its second-level codes are not always the nearest
            )
            layer.load_state_dict({"weight": part.weight.detach()})
            parent, _, last = name.rpartition(".")
            setattr(theirs.get_submodule(parent), last, layer.to("cpu"))
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(theirs, config)
    attached = attach(ours, {"rank": 8, "alpha": 16}, double_quant=False)
    randomize(ours)
    pairs = {}
    for path, layer in attached.layers.items():
        peer = theirs.get_submodule(path)
        for name in ("lora_A", "lora_B"):
            parameter = getattr(peer, name)["default"].weight
            parameter.data.copy_(getattr(layer, name))
            pairs[f"{path}.{name}"] = (getattr(layer, name), parameter)
    tokens = torch.randint(0, 128, (2, 24))
    losses = [model(input_ids=tokens, labels=tokens).loss for model in (ours, wrapped)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    assert len(pairs) == 28
    for name, (mine, peer) in pairs.items():
        scale = peer.grad.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(mine.grad / scale, peer.grad / scale, **TOLERANCE)


def test_factors_of_another_dtype_are_refused(tower: Tower) -> None:
    attached = attach(tower, {"rank": 4})
    layer = attached.layers["first"]
    layer.lora_A.data = layer.lora_A.data.half()
    with pytest.raises(UsageError, match="float32"):
        layer._build()

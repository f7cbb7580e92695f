"""Runs whose adapters begin as PiSSA or LoftQ, against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.adapters.peft_files import read_adapter, write_adapter
from halfbyte.adapters.spec import LoraSpec
from halfbyte.adapters.training import attach_new_adapter
from halfbyte.errors import ConfigError
from halfbyte.layers.cross_entropy import linear_cross_entropy
from halfbyte.layers.segments import pack
from halfbyte.models.load import load_decoder
from halfbyte.models.quantize_model import quantize_model
from halfbyte.training.run import resume, train
from tiny_models import make_oracle, random_tokens, save_directory
from training.test_resume import LONG, StopAt, results
from training.tiny_run import make_config, make_model

# PEFT asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

RANK, ALPHA = 4, 12.0
SPEC = {"rank": RANK, "alpha": ALPHA}


def product_gradients(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor) -> Tensor:
    """By how much gradient descent moves B A: not changed by the signs of singular vectors."""
    return grad_b @ a + b @ grad_a


@pytest.fixture
def oracle(tmp_path: Path) -> Any:
    model = make_oracle("llama")
    save_directory(model, tmp_path / "model")
    return model


def test_pissa_steps_as_pefts_does(oracle: Any, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    tokens = random_tokens(33)
    decoder = load_decoder(tmp_path / "model", compute_dtype=torch.float32)
    with torch.no_grad():
        before = decoder.logits(tokens, pack([33]))
    adapter = attach_new_adapter(decoder, LoraSpec.model_validate(SPEC | {"init": "pissa"}), 0)
    features = decoder(tokens[:-1], pack([32]))
    linear_cross_entropy(features, tokens[1:], decoder.head, grad_scale=1 / 32).div(32).backward()
    with torch.no_grad():
        after = decoder.logits(tokens, pack([33]))
    # The principal part is added and taken away again: rounding of values of the logits' size.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))

    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        init_lora_weights="pissa",
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
    )
    model = peft.get_peft_model(oracle, config)
    model(input_ids=tokens[None], labels=tokens[None]).loss.backward()
    for path, shape in adapter.shapes.items():
        a, b = (adapter.parameters[f"{path}.lora_{f}"] for f in "AB")
        layer = model.get_submodule(f"base_model.model.{path}")
        their_a, their_b = (getattr(layer, f"lora_{f}")["default"].weight for f in "AB")
        # Singular vectors of a random 48 by 80 matrix: eight iterations over 20 directions leave
        # the fourth with an error of a few 1e-3 of its neighbours.
        ours, theirs = b @ a, their_b @ their_a
        assert (ours - theirs).norm() < 0.02 * theirs.norm(), path
        ours = product_gradients(a, b, a.grad, b.grad)
        theirs = product_gradients(their_a, their_b, their_a.grad, their_b.grad)
        assert (ours - theirs).norm() < 0.05 * theirs.norm(), path
        assert shape.scaling == ALPHA / RANK


def test_a_trained_pissa_adapter_is_an_ordinary_one_to_peft(oracle: Any, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    decoder = load_decoder(tmp_path / "model", compute_dtype=torch.float32)
    spec = LoraSpec.model_validate(SPEC | {"init": "pissa", "use_rslora": True})
    adapter = attach_new_adapter(decoder, spec, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        tokens = random_tokens(20)
        ours = decoder.logits(tokens, pack([20]))
    write_adapter(adapter.to_adapter("base", {}), tmp_path / "adapter")
    written = read_adapter(tmp_path / "adapter")
    assert {update.rank for update in written.modules.values()} == {2 * RANK}
    theirs = peft.PeftModel.from_pretrained(oracle, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = theirs(input_ids=tokens[None]).logits[0]
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4 * float(logits.abs().max()))


@pytest.fixture
def quantized(tmp_path: Path) -> tuple[Path, Path]:
    original = make_model(tmp_path / "model-16bit", four_bit=False)
    quantize_model(original, tmp_path / "model-4bit")
    return original, tmp_path / "model-4bit"


def weights_error(model: Path, original: Path, adapter: Path) -> float:
    """How far the linear weights are from the original ones, adapter included."""
    updates = read_adapter(adapter).modules
    ours, theirs = hb.load(model).decoder, hb.load(original).decoder
    total = 0.0
    for path, linear in ours.linears.items():
        weight = linear.store.acquire(linear.weight)
        goal = theirs.linears[path].store.acquire(linear.weight)
        assert isinstance(weight, hb.QuantizedTensor)
        assert isinstance(goal, Tensor)
        update = updates[path]
        error = goal.float() - weight.dequantize().float()
        total += float((error - update.scaling * update.b_OR @ update.a_RI).square().sum())
    return total**0.5


def test_loftq_begins_closer_to_the_original_weights(
    quantized: tuple[Path, Path], tmp_path: Path
) -> None:
    original, model = quantized

    def error(name: str, *assignments: str) -> float:
        run = tmp_path / name
        options = (*assignments, "training.max_steps=1", "training.learning_rate=1e-12")
        train(make_config(tmp_path, *options, **{"output.dir": str(run), "lora.rank": 8}))
        return weights_error(model, original, run / "adapter")

    loftq = error("loftq", "lora.init=loftq", f"lora.init_weights={original}")
    # The 8 largest of 32 to 64 directions of white noise hold a third of its energy or more.
    assert loftq < 0.85 * error("default")


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_stopping_and_resuming_changes_no_bit(
    quantized: tuple[Path, Path], tmp_path: Path, init: str
) -> None:
    original, _ = quantized
    weights = (f"lora.init_weights={original}",) if init == "loftq" else ()
    options = (*LONG, "training.num_epochs=1", f"lora.init={init}", *weights)
    whole, parts = (
        make_config(tmp_path, *options, **{"output.dir": str(tmp_path / name)})
        for name in ("whole", "parts")
    )
    train(whole)
    train(parts, StopAt(3))
    resume(tmp_path / "parts")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    ranks = {u.rank for u in read_adapter(tmp_path / "whole" / "adapter").modules.values()}
    assert ranks == {8 if init == "pissa" else 4}


def test_wrong_originals_are_refused_before_any_compute(
    quantized: tuple[Path, Path], tmp_path: Path
) -> None:
    original, _ = quantized
    loftq = "lora.init=loftq"
    with pytest.raises(ConfigError, match="loftq with init_weights expected, or neither"):
        train(make_config(tmp_path, loftq))
    with pytest.raises(ConfigError, match="loftq with init_weights expected, or neither"):
        train(make_config(tmp_path, f"lora.init_weights={original}"))
    other = save_directory(make_oracle("llama"), tmp_path / "other")
    with pytest.raises(ConfigError, match=r"q_proj\.weight: shape \[64, 64\] expected, found"):
        train(make_config(tmp_path, loftq, f"lora.init_weights={other}"))
    with pytest.raises(ConfigError, match=r"q_proj\.weight: differs from the base by 0\.0%"):
        train(
            make_config(
                tmp_path,
                loftq,
                f"lora.init_weights={original}",
                "training.method=lora",
                model=str(original),
            )
        )
    assert not (tmp_path / "run").exists()

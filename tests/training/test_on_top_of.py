"""Training over a frozen adapter: what changes, what must not, and what is left behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte as hb
from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.peft_files import read_adapter, write_adapter
from halfbyte.adapters.stack_files import load_adapter, read_stack
from halfbyte.adapters.training import TRAINED
from halfbyte.errors import ConfigError, FormatError, MissingFileError, VerificationError
from halfbyte.layers.segments import pack
from halfbyte.models.record import RECORD
from halfbyte.training.checkpoint import list_checkpoints
from halfbyte.training.config import Config
from halfbyte.training.methods import BELOW, attach_trained, open_base
from halfbyte.training.metrics import MEASURED_FIELDS, read_records
from halfbyte.training.run import resume, train
from training.test_resume import StopAt
from training.tiny_run import make_config, make_data, make_model

SHORT = ("training.max_steps=8", "training.save_steps=3", "lora.dropout=0.3")


def configure(directory: Path, name: str, *assignments: str, **flags: Any) -> Config:
    return make_config(
        directory, *SHORT, *assignments, **{"output.dir": str(directory / name)}, **flags
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, data, and a run whose adapter others are trained on."""
    directory = tmp_path_factory.mktemp("runs")
    make_model(directory / "model-4bit")
    (directory / "model-4bit" / RECORD).write_text(json.dumps({"fingerprint": "ab" * 32}))
    train(configure(directory, "first", "lora.targets=[q_proj, down_proj]"))
    return directory


@pytest.fixture
def runs(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "runs"))


def on_top(runs: Path, name: str, *assignments: str, below: str = "first/adapter") -> Config:
    flags = {"lora.on_top_of": str(runs / below), "data.train": str(runs / "other.jsonl")}
    if not (runs / "other.jsonl").exists():
        make_data(runs / "other.jsonl", num_rows=40)
    return configure(runs, name, "lora.rank=3", *assignments, **flags)


def results(directory: Path) -> tuple[dict[str, bytes], list[bytes], list[dict[str, object]]]:
    adapter = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted((directory / "adapter").rglob("*"))
        # what differs between runs by design: the paths and the command of the provenance
        if path.is_file() and path.name not in {"provenance.json", "stack.json"}
    }
    last = list_checkpoints(directory)[-1]
    records = [
        {key: value for key, value in record.items() if key not in MEASURED_FIELDS}
        for record in read_records(directory / "metrics.jsonl")
    ]
    return adapter, [path.read_bytes() for path in sorted(last.iterdir())], records


def test_the_result_is_a_stack_over_the_untouched_adapter(runs: Path) -> None:
    result = train(on_top(runs, "second")).result
    assert result == runs / "second" / "adapter"
    stack = read_stack(result)
    assert stack.order == "first > second"
    assert stack.base == "ab" * 32
    before = read_adapter(runs / "first" / "adapter")
    for path, update in before.modules.items():
        kept = stack.parts[0].adapter.modules[path]
        assert torch.equal(kept.a_RI, update.a_RI)
        assert torch.equal(kept.b_OR, update.b_OR)
    top = stack.parts[1].adapter
    assert all(update.rank == 3 and update.b_OR.any() for update in top.modules.values())
    provenance = top.provenance or {}
    assert provenance["on_top_of"] == [{"name": "first", "fingerprint": stack.parts[0].fingerprint}]
    assert (before.provenance or {})["on_top_of"] == []
    third = read_stack(train(on_top(runs, "third", below="second/adapter")).result or "")
    assert third.order == "first > second > third"


def test_the_model_that_was_trained_is_the_one_that_is_loaded(runs: Path) -> None:
    config = on_top(runs, "second")
    trained = attach_trained(open_base(config), config)
    ids = [5, 9, 200, 31]
    model = hb.load(
        config.model, adapters=[runs / "first" / "adapter"], compute_dtype=torch.float32
    )
    expected = model.logits(ids)
    assert trained.decoder.mixes == (((BELOW, 1.0), (TRAINED, 1.0)),)
    model.decoder = trained.decoder
    # B of the new adapter starts at zero, so training starts at the adapter below. float32: the
    # scaling is folded into B before the products, not after them.
    torch.testing.assert_close(model.logits(ids), expected, rtol=1e-5, atol=1e-4)

    train(config)
    stacked = hb.load(
        config.model, adapters=[runs / "second" / "adapter"], compute_dtype=torch.float32
    )
    top = read_adapter(runs / "second" / "adapter" / "2-second")
    with torch.no_grad():
        for path, update in top.modules.items():
            trained.parameters[f"{path}.lora_A"].copy_(update.a_RI)
            trained.parameters[f"{path}.lora_B"].copy_(update.b_OR)
    torch.testing.assert_close(stacked.logits(ids), model.logits(ids), rtol=1e-5, atol=1e-4)
    assert (stacked.logits(ids) - expected).abs().max() > 0.01
    with pytest.raises(VerificationError, match="was trained on top of first"):
        hb.load(config.model, adapters=[runs / "second" / "adapter" / "2-second"])


def test_stopping_and_resuming_changes_no_bit(runs: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(on_top(runs, "whole"))
        train(on_top(runs, "parts"), StopAt(4))
        resume(runs / "parts")
        whole, parts = results(runs / "whole"), results(runs / "parts")
        renamed = {name.replace("2-parts", "2-whole"): data for name, data in parts[0].items()}
        assert (renamed, *parts[1:]) == whole
    finally:
        torch.set_num_threads(threads)


def test_frozen_updates_have_no_dropout(runs: Path) -> None:
    second = on_top(runs, "second")
    trained = attach_trained(open_base(second), second)
    tokens = torch.tensor([5, 9, 200, 31])
    found = [trained.decoder(tokens, pack([4]), dropout_seed=seed) for seed in (1, 2, None)]
    # The adapter below was written with a dropout of 0.3. B of the new one is still zero, so that
    # its own dropout shows nowhere.
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)
    assert found[0].requires_grad


def test_a_run_whose_adapter_below_changed_does_not_go_on(runs: Path) -> None:
    train(on_top(runs, "second"), StopAt(3))
    config = runs / "first" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 17}))
    with pytest.raises(VerificationError, match="not the adapters that this run was begun on"):
        resume(runs / "second")
    shutil.rmtree(runs / "first")
    with pytest.raises(MissingFileError, match="adapter_config"):
        resume(runs / "second")


def test_an_adapter_of_other_shapes_cannot_lie_below(runs: Path) -> None:
    narrow = LoraUpdate(torch.zeros(2, 63), torch.zeros(64, 2), alpha=2.0)
    write_adapter(Adapter({"model.layers.0.self_attn.q_proj": narrow}), runs / "narrow")
    with pytest.raises(FormatError, match="does not fit the base model"):
        train(on_top(runs, "second", below="narrow"))


def test_what_cannot_lie_below_is_refused_before_the_run_begins(runs: Path) -> None:
    with pytest.raises(ConfigError, match="full trains the weights themselves"):
        train(on_top(runs, "second", "training.method=full"))
    (runs / "model-4bit" / RECORD).write_text(json.dumps({"fingerprint": "cd" * 32}))
    with pytest.raises(VerificationError, match="trained on another base"):
        train(on_top(runs, "second"))
    with pytest.raises(MissingFileError):
        train(on_top(runs, "second", below="nothing"))
    stack = runs / "stack"
    stack.mkdir()
    (stack / "stack.json").write_text('{"version": 1}')
    with pytest.raises(FormatError, match="not a stack"):
        train(on_top(runs, "second", below="stack"))
    assert not (runs / "second").exists()


def test_flattening_a_trained_stack_keeps_its_logits(runs: Path) -> None:
    config = on_top(runs, "second")
    train(config)
    write_adapter(load_adapter(runs / "second" / "adapter"), runs / "flat")
    ids = [5, 9, 200, 31]
    found = [
        hb.load(config.model, adapters=[path], compute_dtype=torch.float32).logits(ids)
        for path in (runs / "second" / "adapter", runs / "flat")
    ]
    assert torch.equal(*found)

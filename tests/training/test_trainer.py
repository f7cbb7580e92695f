"""What a run does when things go wrong, and when they go well."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte as hb
from halfbyte.adapters.peft_files import read_adapter
from halfbyte.errors import (
    ConfigError,
    DataError,
    MissingFileError,
    StorageError,
    TrainingError,
    VerificationError,
)
from halfbyte.formats.shards import open_shards
from halfbyte.storage.fingerprint import fingerprint_tensors
from halfbyte.training import checkpoint as checkpoint_module
from halfbyte.training import step as step_module
from halfbyte.training.checkpoint import list_checkpoints, newest_valid
from halfbyte.training.metrics import read_records
from halfbyte.training.progress import Silent
from halfbyte.training.run import resume, train
from halfbyte.training.trainer import Ending
from training.tiny_run import make_config, make_data, make_model

FIELDS = {
    "step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "num_targets",
    "seconds", "tokens_per_second", "peak_bytes", "peak_private_bytes",
}  # fmt: skip


class Notes(Silent):
    """Keeps what was noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def noted(self, text: str) -> None:
        self.notes.append(text)


def records(directory: Path) -> list[dict[str, Any]]:
    return list(read_records(directory / "metrics.jsonl"))


def test_a_run_learns_and_leaves_what_it_should(tmp_path: Path) -> None:
    config = make_config(tmp_path, "training.num_epochs=2")
    result = train(config)
    run = tmp_path / "run"
    assert result.outcome.ending is Ending.COMPLETE
    assert result.result == run / "adapter"
    adapter = read_adapter(run / "adapter")
    assert len(adapter.modules) == 14
    assert all(update.b_OR.abs().max() > 0 for update in adapter.modules.values())
    steps = [record for record in records(run) if "loss" in record]
    assert set(steps[0]) == FIELDS
    assert steps[-1]["loss"] < steps[0]["loss"] / 2
    evaluations = [record for record in records(run) if "eval_loss" in record]
    assert len(evaluations) == 2  # one an epoch
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list_checkpoints(run)) == 2
    assert adapter.provenance is not None
    assert adapter.provenance["method"] == "qlora"
    config_file = (run / "adapter" / "adapter_config.json").read_text()
    assert json.loads(config_file)["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_the_base_is_not_changed(tmp_path: Path, method: str) -> None:
    config = make_config(tmp_path, f"training.method={method}", "training.max_steps=3")

    def fingerprint() -> str:
        shards = open_shards(Path(config.model))
        return fingerprint_tensors({name: shards.read(name) for name in shards})

    before = fingerprint()
    train(config)
    assert fingerprint() == before


def test_the_adapter_names_its_base_by_fingerprint(tmp_path: Path) -> None:
    config = make_config(tmp_path, "training.max_steps=1")
    record = {"version": 1, "fingerprint": "f" * 64, "quantizer": {"codebook": "nf4"}, "x": 1}
    (Path(config.model) / "halfbyte.json").write_text(json.dumps(record))
    train(config)
    provenance = read_adapter(tmp_path / "run" / "adapter").provenance
    assert provenance is not None
    assert provenance["base"] == {
        "path": config.model,
        "fingerprint": "f" * 64,
        "quantizer": {"codebook": "nf4"},
    }
    hb.load(config.model, adapters=[tmp_path / "run" / "adapter"])
    (Path(config.model) / "halfbyte.json").write_text(json.dumps(record | {"fingerprint": "0"}))
    with pytest.raises(VerificationError, match="was trained on another base"):
        hb.load(config.model, adapters=[tmp_path / "run" / "adapter"])


def test_training_all_weights_leaves_a_model_that_opens(tmp_path: Path) -> None:
    from halfbyte.models.load import load_decoder  # noqa: PLC0415

    config = make_config(
        tmp_path, "training.method=full", "training.max_steps=4", "training.learning_rate=0.003"
    )
    result = train(config)
    assert result.result == tmp_path / "run" / "model"
    decoder = load_decoder(result.result, compute_dtype=torch.float32)
    assert len(decoder.layers) == 2
    losses = [record["loss"] for record in records(tmp_path / "run") if "loss" in record]
    assert losses[-1] < losses[0]


def test_no_better_loss_stops_the_run(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        "training.patience=2",
        "training.eval_steps=1",
        "training.max_steps=50",
        "training.learning_rate=1e-30",
    )
    result = train(config)
    assert result.outcome.ending is Ending.EARLY
    assert result.outcome.step == 3
    assert result.result is not None


def poison(monkeypatch: pytest.MonkeyPatch, at_call: int) -> None:
    """Make one loss infinite: the `at_call`-th of the process."""
    real, calls = step_module.linear_cross_entropy, 0

    def broken(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = real(*arguments, **options)
        return loss * float("inf") if calls == at_call else loss

    monkeypatch.setattr(step_module, "linear_cross_entropy", broken)


def test_a_step_that_is_not_finite_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, at_call=3)
    config = make_config(
        tmp_path, "training.on_nan=skip", "training.max_steps=4", "training.micro_batch_tokens=256"
    )
    observer = Notes()
    train(config, observer)
    steps = [record for record in records(tmp_path / "run") if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert [record["loss"] is None for record in steps] == [False, False, True, False]
    failure = steps[2]["not_applied"]
    assert failure["rows"][0].startswith("data.jsonl:")
    assert "gradient of model.layers" in failure["where"]
    assert any("step 3 was not applied" in note for note in observer.notes)


def test_a_step_that_is_not_finite_stops_the_run_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, at_call=3)
        config = make_config(tmp_path, "training.max_steps=5", "training.micro_batch_tokens=256")
        with pytest.raises(TrainingError, match="step 3 was not applied"):
            train(config)
    found, _ = newest_valid(tmp_path / "run")
    assert found is not None
    assert found.step == 2
    resume(tmp_path / "run")
    steps = [record for record in records(tmp_path / "run") if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    assert all(record["loss"] is not None for record in steps)


def test_a_layer_that_is_not_finite_is_found(tmp_path: Path) -> None:
    config = make_config(tmp_path, "training.learning_rate=1e30", "training.max_steps=5")
    with pytest.raises(TrainingError, match=r"(output of layer \d|gradient of model\.layers|loss)"):
        train(config)


def test_an_overflow_in_float16_lowers_the_scale_and_loses_nothing(tmp_path: Path) -> None:
    train(make_config(tmp_path, "training.compute_dtype=fp16", "training.max_steps=6"))
    steps = [record for record in records(tmp_path / "run") if "loss" in record]
    assert len(steps) == 6
    assert all("not_applied" not in record for record in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_a_full_disk_leaves_the_last_checkpoint_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = checkpoint_module.write_safetensors, 0

    def full(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # the optimizer's file of the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    arguments = ("training.save_steps=2", "training.max_steps=6")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_safetensors", full)
        with pytest.raises(StorageError, match="the disk is full") as caught:
            train(make_config(tmp_path, *arguments))
    assert "halfbyte resume" in caught.value.hint
    found, skipped = newest_valid(tmp_path / "run")
    assert found is not None
    assert (found.step, skipped) == (2, [])
    assert resume(tmp_path / "run").outcome.ending is Ending.COMPLETE


def test_wrong_input_is_named_before_the_run_directory_is_made(tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", four_bit=False)
    with pytest.raises(ConfigError, match="needs a 4-bit base"):
        train(make_config(tmp_path, model=str(plain)))
    four_bit = make_model(tmp_path / "packed")
    with pytest.raises(ConfigError, match="needs weights of 16 bits"):
        train(make_config(tmp_path, "training.method=full", model=str(four_bit)))
    with pytest.raises(ConfigError, match="matches no linear layer"):
        train(make_config(tmp_path, "lora.targets=[c_proj]"))
    with pytest.raises(MissingFileError):
        train(make_config(tmp_path, "data.train=absent.jsonl"))
    with pytest.raises(MissingFileError):
        train(make_config(tmp_path, "model=absent"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a ", "completion": "b"}\n{"prompt": 3}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        train(make_config(tmp_path, f"data.train={tmp_path / 'bad.jsonl'}"))
    assert not (tmp_path / "run").exists()


def test_a_document_longer_than_a_batch_is_named(tmp_path: Path) -> None:
    make_data(tmp_path / "data.jsonl")
    with pytest.raises((ConfigError, DataError), match=r"data\.jsonl:\d+: \d+ tokens"):
        train(make_config(tmp_path, "training.micro_batch_tokens=20"))

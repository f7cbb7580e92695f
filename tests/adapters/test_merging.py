"""Merging into 16 and 32 bits: transformers loads the result, and it says what was merged."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.merging import merge_dense
from halfbyte.errors import (
    FormatError,
    HalfbyteError,
    MissingFileError,
    StorageError,
    UnsafeArtifactError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from halfbyte.formats.safetensors_writer import SafetensorsWriter
from halfbyte.formats.shards import open_shards
from halfbyte.models.base_source import measure_fingerprint
from halfbyte.models.record import RECORD, recorded_fingerprint
from tiny_adapters import random_adapter, save_random_adapter
from tiny_models import change_config, make_oracle, random_tokens, save_directory

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make_base(directory: Path, case: str = "llama", *, four_bit: bool = True) -> Path:
    return save_directory(make_oracle(case), directory, four_bit=four_bit)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def live_logits(base: Path, adapter: Path, tokens: Tensor) -> Tensor:
    model = hb.load(base, adapters=[adapter], compute_dtype=torch.float32)
    return model.logits(tokens.tolist())


def their_logits(directory: Path, tokens: Tensor) -> Tensor:
    transformers: Any = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    with torch.no_grad():
        logits: Tensor = model(tokens[None]).logits[0]
    return logits


@pytest.mark.parametrize("case", ["llama", "llama-biases-tied", "qwen3", "gemma3"])
def test_transformers_gives_the_logits_of_base_and_adapter(tmp_path: Path, case: str) -> None:
    base = make_base(tmp_path / "base", case)
    adapter = save_random_adapter(tmp_path / "adapter", base)
    merged = merge_dense(base, adapter, tmp_path / "merged", dtype="fp32")
    tokens = random_tokens(40)
    expected = live_logits(base, adapter, tokens)
    found = their_logits(merged.path, tokens)
    # float32 everywhere: as between our decoder and transformers, 1e-4 of the range.
    assert (found - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())
    plain = hb.load(base, compute_dtype=torch.float32).logits(tokens.tolist())
    assert (plain - expected).abs().max() > 0.1 * (expected.max() - expected.min())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("four_bit", [True, False])
def test_every_weight_is_the_exact_sum_rounded_once(
    tmp_path: Path, dtype: str, four_bit: bool
) -> None:
    base = make_base(tmp_path / "base", four_bit=four_bit)
    adapter = random_adapter(base)
    merged = merge_dense(base, adapter, tmp_path / "merged", dtype=dtype)
    decoder = hb.load(base).decoder
    written = open_shards(merged.path)
    unit = torch.finfo(DTYPES[dtype]).eps / 2
    for path, linear in decoder.linears.items():
        weight = decoder.store.acquire(linear.weight)
        dense = weight if isinstance(weight, Tensor) else weight.dequantize(dtype=torch.float32)
        exact = dense.double()
        if path in adapter.modules:
            update = adapter.modules[path]
            exact = exact + update.scaling * (update.b_OR.double() @ update.a_RI.double())
        found = written.read(f"{path}.weight")
        assert found.dtype == DTYPES[dtype]
        # One rounding to the dtype, after float32 arithmetic on a sum of at most 9 terms of
        # magnitude below 1; float16 is subnormal below 2^-14, in steps of 2^-24.
        torch.testing.assert_close(found.double(), exact, rtol=unit, atol=9 * 2**-24)
    assert {str(entry.dtype) for _, entry in written.values()} == {str(DTYPES[dtype])}
    config = json.loads((merged.path / "config.json").read_text())
    assert config["dtype"] == str(DTYPES[dtype]).removeprefix("torch.")
    assert "quantization_config" not in config


def test_changes_are_what_they_say(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(base)
    merged = merge_dense(base, adapter, tmp_path / "merged")
    assert [c.path for c in merged.changes] == sorted(adapter.modules)
    decoder = hb.load(base).decoder
    for change in merged.changes:
        weight = decoder.store.acquire(decoder.linears[change.path].weight)
        assert not isinstance(weight, Tensor)
        dense = weight.dequantize(dtype=torch.float32)
        update = adapter.modules[change.path]
        delta = update.scaling * (update.b_OR @ update.a_RI)
        assert change.update == pytest.approx(float(delta.norm() / dense.norm()), rel=1e-5)
        lost = (dense + delta).bfloat16().float() - (dense + delta)
        assert change.rounding == pytest.approx(float(lost.norm() / delta.norm()), rel=1e-3)
        assert change.base_difference is None


def test_the_original_weights_take_the_update_on_request(tmp_path: Path) -> None:
    original = make_base(tmp_path / "original", four_bit=False)
    base = make_base(tmp_path / "base")
    adapter = random_adapter(base)
    merged = merge_dense(base, adapter, tmp_path / "merged", dtype="fp32", base_weights=original)
    written, dense = open_shards(merged.path), open_shards(original)
    four_bit = hb.load(base).decoder
    for change in merged.changes:
        name = f"{change.path}.weight"
        update = adapter.modules[change.path]
        delta = update.scaling * (update.b_OR @ update.a_RI)
        torch.testing.assert_close(written.read(name), dense.read(name) + delta)
        weight = four_bit.store.acquire(four_bit.linears[change.path].weight)
        assert not isinstance(weight, Tensor)
        decoded = weight.dequantize(dtype=torch.float32)
        expected = float((dense.read(name) - decoded).norm() / decoded.norm())
        assert change.base_difference == pytest.approx(expected, rel=1e-5)
    record = json.loads((merged.path / RECORD).read_text())["merge"]
    assert record["weights"]["name"] == "original"


def test_the_record_names_base_and_adapter(base: Path, tmp_path: Path) -> None:
    adapter = save_random_adapter(tmp_path / "adapter", base)
    merged = merge_dense(base, adapter, tmp_path / "merged")
    record = json.loads((merged.path / RECORD).read_text())
    measured = measure_fingerprint(open_shards(base))
    assert record["merge"]["base"] == {"path": str(base), "fingerprint": measured}
    assert record["merge"]["adapter"]["path"] == str(adapter)
    assert (
        record["fingerprint"]
        == merged.fingerprint
        == recorded_fingerprint(merged.path)
        == measure_fingerprint(open_shards(merged.path))
    )
    again = merge_dense(base, adapter, tmp_path / "shards", shard_bytes=60_000)
    assert len(open_shards(again.path).files) > 1
    assert again.fingerprint == merged.fingerprint


Fault = Callable[[Adapter], Adapter]


def with_nan(adapter: Adapter) -> Adapter:
    path, update = next(iter(adapter.modules.items()))
    a_RI = update.a_RI.clone()
    a_RI[1, 2] = float("nan")
    return replace(adapter, modules=dict(adapter.modules) | {path: replace(update, a_RI=a_RI)})


def with_wrong_shapes(adapter: Adapter) -> Adapter:
    wrong = LoraUpdate(torch.zeros(2, 5), torch.zeros(7, 2), 1.0)
    modules = dict(adapter.modules) | {"model.layers.0.mlp.up_proj": wrong, "lm_head": wrong}
    return replace(adapter, modules=modules)


def with_wrong_base(adapter: Adapter) -> Adapter:
    return replace(adapter, provenance={"base": {"fingerprint": "f" * 64}})


@pytest.mark.parametrize(
    ("faults", "kind", "messages"),
    [
        ([with_nan], FormatError, ["holds 1 NaN", "at index [1, 2]"]),
        (
            [with_wrong_shapes, with_nan],
            FormatError,
            ["4 problems", "up_proj.lora_A", "up_proj.lora_B", "lm_head: the base", "holds 1 NaN"],
        ),
        ([with_wrong_base], VerificationError, [f"fingerprint {'f' * 64} expected of the base"]),
        (
            [with_wrong_base, with_wrong_shapes, with_nan],
            VerificationError,
            ["5 problems", "ffff", "up_proj.lora_A", "holds 1 NaN"],
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(
    base: Path, tmp_path: Path, faults: list[Fault], kind: type[HalfbyteError], messages: list[str]
) -> None:
    adapter = random_adapter(base)
    for fault in faults:
        adapter = fault(adapter)
    with pytest.raises(kind) as raised:
        merge_dense(base, adapter, tmp_path / "merged")
    for message in messages:
        assert message in str(raised.value)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_from_above_another_wants_its_stack(base: Path, tmp_path: Path) -> None:
    below = [{"name": "first", "fingerprint": "0" * 64}]
    above = replace(random_adapter(base), provenance={"on_top_of": below})
    with pytest.raises(VerificationError, match="trained on top of first: merge the stack"):
        merge_dense(base, above, tmp_path / "merged")


def test_a_base_that_was_changed_is_refused(base: Path, tmp_path: Path) -> None:
    (base / RECORD).write_text(json.dumps({"fingerprint": "0" * 64}))
    with pytest.raises(VerificationError, match=f"fingerprint {'0' * 64} recorded"):
        merge_dense(base, random_adapter(base), tmp_path / "merged")


def test_hostile_inputs_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_random_adapter(tmp_path / "adapter", base)
    config = adapter / "adapter_config.json"
    good = config.read_text()
    config.write_text(json.dumps(json.loads(good) | {"rank_pattern": {"(a+)+$": 4}}))
    with pytest.raises(FormatError, match="too complex"):
        merge_dense(base, adapter, tmp_path / "merged")
    config.write_text(json.dumps(json.loads(good) | {"use_dora": True, "bias": "all"}))
    with pytest.raises(UnsupportedError, match="2 problems"):
        merge_dense(base, adapter, tmp_path / "merged")
    config.write_text(good)
    change_config(base, auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(UnsafeArtifactError, match="auto_map"):
        merge_dense(base, adapter, tmp_path / "merged")
    with pytest.raises(MissingFileError, match="not a directory"):
        merge_dense(tmp_path / "none", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_original_weights_of_another_model_are_refused(base: Path, tmp_path: Path) -> None:
    other = save_directory(make_oracle("llama", intermediate_size=96), tmp_path / "other")
    with pytest.raises(FormatError, match=r"not the model that the base was made from: 12 prob"):
        merge_dense(base, random_adapter(base), tmp_path / "merged", base_weights=other)


def test_failing_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = SafetensorsWriter.write, 0

    def full(self: SafetensorsWriter, name: str, tensor: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", full)
    with pytest.raises(StorageError, match="the disk is full"):
        merge_dense(base, random_adapter(base), tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_where_to_write(base: Path, tmp_path: Path) -> None:
    adapter = save_random_adapter(tmp_path / "adapter", base)
    with pytest.raises(UsageError, match=r"one of bf16, fp16, fp32 expected, found 'int8'"):
        merge_dense(base, adapter, tmp_path / "merged", dtype="int8")
    for out in (base / "inside", adapter, tmp_path):
        with pytest.raises(UsageError, match=r"lies inside|holds the source"):
            merge_dense(base, adapter, out, replace=True)
    first = merge_dense(base, adapter, tmp_path / "merged")
    with pytest.raises(StorageError, match="exists already"):
        merge_dense(base, adapter, tmp_path / "merged")
    again = merge_dense(base, adapter, tmp_path / "merged", dtype="fp16", replace=True)
    assert again.fingerprint != first.fingerprint
    shutil.rmtree(adapter)
    assert hb.load(again.path).decoder.linears


def test_what_float16_cannot_hold_is_an_error(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(base)
    path, update = next(iter(adapter.modules.items()))
    modules = dict(adapter.modules) | {path: replace(update, alpha=1e9)}
    with pytest.raises(FormatError, match=rf"{path}.weight as float16 holds"):
        merge_dense(base, replace(adapter, modules=modules), tmp_path / "merged", dtype="fp16")

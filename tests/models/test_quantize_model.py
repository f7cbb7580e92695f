"""Whole models to 4 bits: what is written, for whom, and that failing leaves nothing behind."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.errors import (
    FormatError,
    HalfbyteError,
    MissingFileError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from halfbyte.formats.bitsandbytes_layout import from_bitsandbytes, quantized_names
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_writer import SafetensorsWriter, write_safetensors
from halfbyte.formats.shards import open_shards, plan_shards, shard_file_names, write_index
from halfbyte.models import hub
from halfbyte.models.config import parse_config
from halfbyte.models.layout import layout_of
from halfbyte.models.quantization_plan import Quantizer, plan_quantization
from halfbyte.models.quantize_model import RECORD, REPORT, Progress, quantize_model
from halfbyte.models.sources import open_source
from halfbyte.storage import atomic
from halfbyte.storage.fingerprint import fingerprint_tensors
from tiny_tokenizers import write_model

# Rows of whole blocks: bitsandbytes' CPU code is wrong where blocks cross rows.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}


def weights(
    config: dict[str, Any] = CONFIG, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    refs = layout_of(parse_config(config)).refs()
    return {
        ref.name: (torch.randn(ref.shape, generator=generator) * 0.05 + ("norm" in ref.name)).to(
            dtype
        )
        for ref in refs
    }


def write_source(
    directory: Path, tensors: dict[str, Tensor] | None = None, **config: object
) -> Path:
    write_model(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    write_safetensors(directory / "model.safetensors", tensors or weights(CONFIG | config))
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def read(directory: Path) -> dict[str, Tensor]:
    shards = open_shards(directory)
    return {name: shards.read(name) for name in shards}


def dequantized(directory: Path) -> dict[str, Tensor]:
    tensors = read(directory)
    four_bit = quantized_names(tensors)
    out = {n: t for n, t in tensors.items() if ".weight." not in n and n not in four_bit}
    return out | {n: from_bitsandbytes(n, tensors).dequantize() for n in four_bit}


def listing(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@contextmanager
def one_thread() -> Iterator[None]:
    """The mean of many scales depends on the number of threads that add them up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "int4_affine"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_weight_is_quantized_as_alone(
    source: Path, tmp_path: Path, codebook: str, double_quant: bool
) -> None:
    made = hb.quantize_model(
        source, tmp_path / "out", codebook=codebook, block_size=32, double_quant=double_quant
    )
    found, original = dequantized(made.path), weights()
    assert found.keys() == original.keys()
    assert (made.num_quantized, made.num_kept) == (14, 7)
    for name, tensor in original.items():
        if ".layers." in name and "norm" not in name:
            with one_thread():
                alone = hb.quantize(tensor, codebook, block_size=32, double_quant=double_quant)
            assert torch.equal(found[name], alone.dequantize())
        else:
            assert torch.equal(found[name], tensor)


def test_the_directory_is_complete_and_deterministic(source: Path, tmp_path: Path) -> None:
    before = listing(source)
    first = quantize_model(source, tmp_path / "a")
    second = quantize_model(source, tmp_path / "b")
    assert listing(first.path) == listing(second.path)
    assert listing(source) == before
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ):
        assert (first.path / name).read_bytes() == before[name]
    record = json.loads((first.path / RECORD).read_text())
    assert record["fingerprint"] == first.fingerprint == fingerprint_tensors(read(first.path))
    assert record["quantizer"] == {
        "codebook": "nf4",
        "block_size": 64,
        "double_quant": True,
        "keep": [],
    }
    assert record["source"] == {"kind": "directory", "name": "source"}
    assert first.source_bytes == sum(t.nbytes for t in weights().values())
    assert first.nbytes == sum(t.nbytes for t in read(first.path).values())


def test_transformers_and_bitsandbytes_load_it(source: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    made = quantize_model(source, tmp_path / "out", keep=["model.layers.1.mlp.up_proj"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made.path).eval()
    assert theirs.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert theirs.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
    plain = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    plain.load_state_dict(dequantized(made.path))
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        ours, expected = theirs(ids).logits.float(), plain(ids).logits.float()
    # Both multiply the same bfloat16 weights; sums are taken in another order, a rounding or two
    # of 2^-8 each on the way through two layers.
    assert (ours - expected).abs().max() <= 2**-5 * expected.abs().max()


def test_shards(source: Path, tmp_path: Path) -> None:
    whole = quantize_model(source, tmp_path / "whole")
    cut = quantize_model(source, tmp_path / "cut", shard_bytes=30_000)
    assert len(list(cut.path.glob("model-*.safetensors"))) > 3
    assert whole.fingerprint == cut.fingerprint
    ours, theirs = read(whole.path), read(cut.path)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours.keys() | theirs.keys())
    again = write_source(tmp_path / "sharded")
    tensors = weights()
    (again / "model.safetensors").unlink()
    for i, names in enumerate((list(tensors)[:5], list(tensors)[5:]), start=1):
        write_safetensors(
            again / f"model-0000{i}-of-00002.safetensors", {n: tensors[n] for n in names}
        )
    write_index(again, [SafetensorsFile.open(p) for p in sorted(again.glob("model-*"))])
    assert quantize_model(again, tmp_path / "from-shards").fingerprint == whole.fingerprint


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files(source: Path, tmp_path: Path, sharded: bool) -> None:
    old = write_source(tmp_path / "old")
    (old / "model.safetensors").unlink()
    tensors = weights()
    if sharded:
        halves = {
            "pytorch_model-1.bin": list(tensors)[:6],
            "pytorch_model-2.bin": list(tensors)[6:],
        }
        for name, names in halves.items():
            torch.save({n: tensors[n] for n in names}, old / name)
        weight_map = {n: name for name, names in halves.items() for n in names}
        index = json.dumps({"weight_map": weight_map})
        (old / "pytorch_model.bin.index.json").write_text(index)
    else:
        torch.save(tensors, old / "pytorch_model.bin")
    made = quantize_model(old, tmp_path / "from-bin")
    assert made.fingerprint == quantize_model(source, tmp_path / "out").fingerprint
    assert any("pickled" in note for note in made.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    source = write_source(tmp_path / "source", weights(dtype=dtype), torch_dtype=name)
    made = quantize_model(source, tmp_path / "out")
    kept = torch.float16 if dtype == torch.float16 else torch.bfloat16
    config = json.loads((made.path / "config.json").read_text())
    assert config["dtype"] == str(kept).removeprefix("torch.")
    assert "torch_dtype" not in config
    assert {t.dtype for t in dequantized(made.path).values()} == {kept}


def test_keep(source: Path, tmp_path: Path) -> None:
    made = quantize_model(source, tmp_path / "out", keep=["*.down_proj", "model.layers.0.*"])
    kept = {n for n in dequantized(made.path) if n not in quantized_names(read(made.path))}
    assert {n for n in kept if "proj" in n} == {
        n for n in weights() if "down_proj" in n or ("layers.0" in n and "proj" in n)
    }
    skip = json.loads((made.path / "config.json").read_text())["quantization_config"][
        "llm_int8_skip_modules"
    ]
    assert "lm_head" in skip
    assert "model.layers.1.mlp.down_proj" in skip
    with pytest.raises(UsageError, match=r"2 problems[^$]*'nothing' matches no tensor"):
        quantize_model(source, tmp_path / "none", keep=["nothing", "*.none"])


def test_report_and_progress(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    made = quantize_model(source, tmp_path / "out", report=True, progress=seen.append)
    assert made.report is not None
    written = json.loads((made.path / REPORT).read_text())
    assert written == json.loads(json.dumps(made.report.to_json()))
    assert len(made.report.tensors) == made.num_quantized
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1] == Progress(made.source_bytes, made.source_bytes)


def test_the_predicted_size(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_quantization(open_source(source), Quantizer())
    made = quantize_model(source, tmp_path / "out")
    written = (made.path / "model.safetensors").stat().st_size
    assert written <= plan.num_bytes <= written + 400 * len(read(made.path))
    usage = shutil.disk_usage(tmp_path)._replace(free=plan.num_bytes)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="bytes needed"):
        quantize_model(source, tmp_path / "no-space")
    assert not (tmp_path / "no-space").exists()


Damage = Callable[[dict[str, Tensor]], None]


def put(name: str, value: float, at: tuple[int, ...]) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name][at] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            put("model.layers.1.mlp.up_proj.weight", float("nan"), (3, 5)),
            r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN .* at index \[3, 5\]",
        ),
        (
            put("model.embed_tokens.weight", float("inf"), (7, 1)),
            r"model\.embed_tokens\.weight holds 1 .* at index \[7, 1\]",
        ),
    ],
)
def test_a_nan_is_named_and_leaves_nothing(tmp_path: Path, damage: Damage, message: str) -> None:
    tensors = weights()
    damage(tensors)
    source = write_source(tmp_path / "source", tensors)
    with pytest.raises(FormatError, match=message):
        quantize_model(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_what_float16_cannot_hold_is_an_error(tmp_path: Path) -> None:
    tensors = weights(dtype=torch.float32)
    tensors["lm_head.weight"][2, 2] = 1e6
    source = write_source(tmp_path / "source", tensors, torch_dtype="float16")
    with pytest.raises(FormatError, match=r"lm_head\.weight as float16 holds 1"):
        quantize_model(source, tmp_path / "out")


def test_a_full_disk_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    write = SafetensorsWriter.write

    def full(self: SafetensorsWriter, name: str, tensor: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", full)
    with pytest.raises(StorageError, match="the disk is full"):
        quantize_model(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_faulty_disk_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.models import weight_writing  # noqa: PLC0415

    def fail(_: SafetensorsWriter) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(weight_writing, "SYNC_EVERY_BYTES", 1024)
    monkeypatch.setattr(SafetensorsWriter, "sync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        quantize_model(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(source: Path, tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import os, sys\n"
        "from halfbyte.cli import app\n"
        "from halfbyte.models import quantize_model as q\n"
        "from halfbyte.models import weight_writing as r\n"
        "r.MAX_BYTES_IN_FLIGHT = 0\n"
        "real = q.write_weights\n"
        "def stop(*args, progress, **rest):\n"
        "    def kill(_):\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "    return real(*args, progress=kill, **rest)\n"
        "q.write_weights = stop\n"
        f"sys.exit(app.run(['quantize', {str(source)!r}, {str(tmp_path / 'out')!r}]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 130, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_existing_directory(source: Path, tmp_path: Path) -> None:
    made = quantize_model(source, tmp_path / "out")
    with pytest.raises(StorageError, match="exists already"):
        quantize_model(source, tmp_path / "out")
    other = quantize_model(source, tmp_path / "out", codebook="fp4", replace=True)
    assert other.fingerprint != made.fingerprint
    for inside in (source, source / "out"):
        with pytest.raises(UsageError, match="inside the source"):
            quantize_model(source, inside, replace=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook": "nf3"}, "one of nf4, fp4, int4, int4_affine expected, found 'nf3'"),
        ({"block_size": 63}, "a power of two from 32 to 4096"),
    ],
)
def test_settings_are_checked_before_anything_is_read(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(HalfbyteError, match=message):
        quantize_model("no/such", tmp_path / "out", **settings)


def test_hub_ids(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def snapshot(model_id: str, allow_patterns: list[str]) -> str:
        asked.extend([model_id, allow_patterns])
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    made = quantize_model("org/model", tmp_path / "out")
    assert asked == ["org/model", list(hub.PATTERNS)]
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in hub.PATTERNS[:-2])
    record = json.loads((made.path / RECORD).read_text())
    assert record["source"] == {"kind": "hub", "name": "org/model", "revision": "source"}


def test_a_hub_id_offline(tmp_path: Path) -> None:
    code = (
        "from halfbyte.models.quantize_model import quantize_model\n"
        f"quantize_model('org/model', {str(tmp_path / 'out')!r})\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "not in the hub's cache, and the hub is switched off" in result.stderr


def test_sources_that_are_none(tmp_path: Path, source: Path) -> None:
    for name in ("none", "a/b/c", str(tmp_path / "none"), "org/model.gguf"):
        with pytest.raises(MissingFileError, match="no such directory or file"):
            open_source(name)
    with pytest.raises(UnsupportedError, match=r"a model directory or a \.gguf file"):
        open_source(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="no weights"):
        open_source(source)


MEASURE = """
import json, sys, time
import torch, halfbyte.kernels
from halfbyte.memory.resident import resident
idle = resident().total
import halfbyte as hb
start = time.monotonic()
hb.quantize_model(sys.argv[1], sys.argv[2])
print(json.dumps({"seconds": time.monotonic() - start, "above": resident().peak - idle}))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """TinyLlama's shape, 2.2 GB of bfloat16 in four shards: at most 700 MB above the interpreter."""
    shape = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
    }
    source = write_model(tmp_path / "source")
    (source / "config.json").write_text(json.dumps(CONFIG | shape))
    refs = {ref.name: ref for ref in layout_of(parse_config(CONFIG | shape)).refs()}
    sizes = [{name: 2 * math.prod(ref.shape)} for name, ref in refs.items()]
    shards = plan_shards(sizes, max_bytes=560_000_000)
    assert len(shards) == 4
    noise = torch.randn(32_000 * 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    files = []
    for file, names in zip(shard_file_names(len(shards)), shards, strict=True):
        shapes = {name: refs[name].shape for name in names}
        tensors = {n: noise[: math.prod(shape)].view(shape) for n, shape in shapes.items()}
        write_safetensors(source / file, tensors)
        files.append(SafetensorsFile.open(source / file))
    write_index(source, files)
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(measured.stdout)["above"] <= 700_000_000

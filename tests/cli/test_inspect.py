"""`inspect` explains what it is given, and refuses what lies."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

import halfbyte as hb
from halfbyte.cli import app
from halfbyte.formats.bitsandbytes_layout import quantization_config, to_bitsandbytes
from halfbyte.formats.safetensors_writer import write_safetensors

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
PROJECTION = "model.layers.0.self_attn.q_proj.weight"


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def explain(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict]:
    """What is said to people, and to machines; both must be the same exit code 0."""
    assert app.run(["inspect", str(path), *arguments]) == 0
    text = capsys.readouterr().out
    assert app.run(["inspect", str(path), "--json", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == text
    return text, json.loads(captured.out)


def refusal(path: Path, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert app.run(["inspect", str(path)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    write_json(directory / "config.json", CONFIG)
    tensors = {
        "model.embed_tokens.weight": torch.zeros(1000, 64, dtype=torch.bfloat16),
        "model.norm.weight": torch.zeros(64),
    }
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def write_quantized(directory: Path, **options: object) -> hb.QuantizedTensor:
    weight = torch.randn(64, 640, generator=torch.Generator().manual_seed(0))
    q = hb.quantize(weight, **options)
    tensors: dict[str, Tensor] = to_bitsandbytes(PROJECTION, q)
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.bfloat16)
    write_safetensors(directory / "model.safetensors", tensors)
    return q


def test_a_16_bit_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, record = explain(model, capsys)
    assert text.startswith(f"{model}: a model in bfloat16\n")
    for words in (
        "llama (LlamaForCausalLM)",
        "2 layers, hidden size 64, 2 attention heads, 1 of keys and values, vocabulary of 1,000",
        "64,064 in 2 tensors",
        "bfloat16: 64,000 in 125.0 KiB; float32: 64 in 256 B",
        "runs here     yes",
        "none: there is no tokenizer.json",
        "unknown: there is no provenance.json or halfbyte.json",
    ):
        assert words in text
    assert record["kind"] == "model"
    assert record["family"] == "llama"
    assert record["num_parameters"] == 64_064
    assert record["storage"]["float32"] == {"tensors": 1, "num_elements": 64, "bytes": 256}
    assert record["quantization"] is None
    assert record["doubts"] == []
    assert "tensors" not in record


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "int4_affine"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_a_4_bit_model(
    codebook: str,
    double_quant: bool,
    block_size: int,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"block_size": block_size, "double_quant": double_quant}
    q = write_quantized(model, codebook=codebook, **options)
    stated = quantization_config(codebook, **options)
    write_json(model / "config.json", {**CONFIG, "quantization_config": stated})
    text, record = explain(model, capsys)
    assert ": a model in 4 bits\n" in text
    scales = "8-bit scales in blocks of 256" if double_quant else "32-bit scales"
    assert f"{codebook.upper()} in blocks of {block_size}, {scales}: 1 weights, " in text
    assert f"{q.bits_per_element:.3f} bits a parameter" in text
    quantization = record["quantization"]
    assert quantization["bits_per_element"] == q.bits_per_element
    assert quantization["codebooks"] == [codebook]
    assert quantization["block_sizes"] == [block_size]
    assert quantization["double_quantized"] is double_quant
    assert quantization["num_elements"] == 64 * 640
    assert record["num_parameters"] == 64 * 640 + 64
    assert record["num_tensors"] == 2
    assert record["doubts"] == []


def test_tensors_on_request(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_quantized(model)
    text, record = explain(model, capsys, "--tensors")
    assert f"{PROJECTION}  nf4        64 x 640  " in text
    assert [t["name"] for t in record["tensors"]] == [PROJECTION, "model.norm.weight"]
    assert record["tensors"][0]["shape"] == [64, 640]
    size = sum(t["bytes"] for t in record["tensors"])
    header = record["bytes"] - size
    assert 8 < header < 2000


def test_what_does_not_agree_is_said(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stated = quantization_config("fp4", block_size=64, double_quant=True)
    config = {**CONFIG, "quantization_config": stated, "auto_map": {"AutoModel": "evil.Model"}}
    write_json(model / "config.json", config)
    (model / "pytorch_model.bin").write_bytes(b"\x80")
    text, _ = explain(model, capsys)
    assert "! config.json names code to run (auto_map): halfbyte never runs it\n" in text
    assert "! config.json speaks of bitsandbytes quantization, and no weight is in 4 bits" in text
    assert "! pytorch_model.bin: not looked at, because opening a pickle runs code" in text
    write_quantized(model)
    assert "! config.json says fp4, the weights are nf4" in explain(model, capsys)[0]
    write_json(model / "config.json", CONFIG)
    assert "config.json has no quantization_config" in explain(model, capsys)[0]


def test_what_is_not_known_is_said(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(model / "config.json", {"architectures": "x", "text_config": {"hidden_size": 8}})
    text, _ = explain(model, capsys)
    assert "unknown: config.json has no model_type" in text
    assert "hidden size 8" in text
    assert "runs here     no: " in text
    (model / "config.json").unlink()
    text, record = explain(model, capsys)
    assert "unknown: there is no config.json" in text
    assert record["family"] is None


def test_tokenizer_and_provenance(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(model / "tokenizer.json", {})
    assert "tokenizer.json, without a chat template" in explain(model, capsys)[0]
    write_json(model / "tokenizer_config.json", {"chat_template": "x"})
    assert "tokenizer.json, with a chat template" in explain(model, capsys)[0]
    write_json(model / "provenance.json", {"base": "abc" * 100, "steps": 7, "lora": {"r": 1}})
    text, record = explain(model, capsys)
    assert f"base {('abc' * 100)[:100]}; steps 7; lora.r 1" in text
    assert record["provenance"]["steps"] == "7"
    assert record["provenance"]["lora.r"] == "1"
    write_json(model / "halfbyte.json", {"quantizer": {"codebook": "nf4"}, "config": {"a": 1}})
    text, record = explain(model, capsys)
    assert "quantizer.codebook nf4" in text
    assert "config" not in str(record["provenance"])
    (model / "halfbyte.json").unlink()
    write_json(model / "provenance.json", {})
    assert "provenance.json says nothing" in explain(model, capsys)[0]


def test_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_safetensors(tmp_path / f"{name}.safetensors", {name: torch.zeros(3)})
    index = {"weight_map": {name: f"{name}.safetensors" for name in ("a", "b")}}
    write_json(tmp_path / "model.safetensors.index.json", index)
    text, record = explain(tmp_path, capsys)
    assert "in 2 files" in text
    assert record["num_parameters"] == 6


def test_a_lone_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.safetensors"
    write_safetensors(path, {"x": torch.tensor(1.0), "e": torch.zeros(0, 3)}, {"format": "pt"})
    text, record = explain(path, capsys, "--tensors")
    assert "format='pt'" in text
    assert "x       float32    scalar      4" in text
    assert record["kind"] == "safetensors"
    assert record["num_parameters"] == 1
    write_safetensors(path, {})
    assert "stored as     nothing" in explain(path, capsys)[0]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    write_adapter(directory)
    return directory


def write_adapter(directory: Path, **config: object) -> None:
    settings = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "base_model_name_or_path": "org/base",
        **config,
    }
    write_json(directory / "adapter_config.json", settings)
    tensors = {}
    for layer in range(2):
        for module in ("q_proj", "v_proj"):
            path = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{path}.lora_A.weight"] = torch.zeros(8, 64)
            tensors[f"{path}.lora_B.weight"] = torch.zeros(32, 8)
    write_safetensors(directory / "adapter_model.safetensors", tensors)


def test_an_adapter(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, record = explain(adapter, capsys)
    for words in (
        ": an adapter\n",
        "method      LORA\n",
        "rank        8\n",
        "scaling     2, with alpha 16 and rank 8 (alpha / rank)\n",
        "targets     q_proj x 2, v_proj x 2\n",
        "base model  org/base\n",
        "parameters  3,072 in 8 tensors\n",
        "! the base is known by name only",
    ):
        assert words in text
    assert record["kind"] == "adapter"
    assert record["ranks"] == [8]
    assert record["targets"] == {"q_proj": 2, "v_proj": 2}


def test_variants_of_adapters(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(adapter, use_rslora=True, rank_pattern={"q": 4}, use_dora=True, bias="all", r=4)
    write_json(adapter / "provenance.json", {"base": "sha256:1"})
    text, _ = explain(adapter, capsys)
    assert "LORA with DoRA and biases" in text
    assert "8, with alpha 16 and rank 4 (alpha / sqrt(rank), rsLoRA) unless a pattern" in text
    assert "! adapter_config.json says rank 4, the factors have 8" in text
    assert "known by name only" not in text
    write_adapter(adapter, lora_alpha="x", base_model_name_or_path=None)
    text, _ = explain(adapter, capsys)
    assert "scaling     unknown" in text
    assert "base model  unknown: adapter_config.json does not say" in text


def test_factors_that_do_not_fit(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "base_model.model.a.lora_A.weight": torch.zeros(8, 4),
        "base_model.model.a.lora_B.weight": torch.zeros(4, 6),
        "base_model.model.b.lora_A.weight": torch.zeros(2, 4),
        "base_model.model.c.lora_A.weight": torch.zeros(2, 4),
        "base_model.model.c.lora_B.weight": torch.zeros(4, 2),
        "base_model.model.d.lora_A.weight": torch.zeros(4),
    }
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(12)}
    write_safetensors(adapter / "adapter_model.safetensors", tensors)
    text, _ = explain(adapter, capsys)
    assert "! base_model.model.d.lora_A.weight: not a factor of a linear layer" in text
    assert "! and 5 more of this kind" in text
    assert "2 in 2 layers, 8 in 1 layers" in text
    for i in range(12):
        del tensors[f"extra.{i}"]
    write_safetensors(adapter / "adapter_model.safetensors", tensors)
    text, _ = explain(adapter, capsys)
    assert "! a: A has rank 8 and B has rank 6" in text
    assert "! b: one of its two factors is missing" in text


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    for step in (10, 20):
        checkpoint = directory / "checkpoints" / f"step-{step:06}"
        write_json(checkpoint / "MANIFEST.json", {})
        write_safetensors(checkpoint / "optimizer.safetensors", {"m": torch.zeros(5)})
    (directory / "checkpoints" / "step-000030").mkdir()
    records = [{"step": i, "loss": 2.5 - i / 100} for i in range(1, 31)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines + '{"step": 31, "lo')
    return directory


def test_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, record = explain(run, capsys)
    assert ": a training run\n" in text
    assert "last record  step 30, loss 2.2\n" in text
    assert "checkpoints  step-000010, step-000020\n" in text
    assert "none: the run is not finished" in text
    assert "! checkpoints/step-000030: no MANIFEST.json, so it was not finished" in text
    assert record["last_record"] == {"step": "30", "loss": "2.2"}
    write_adapter(run / "adapter")
    text, record = explain(run, capsys)
    assert "adapter      rank 8, 3,072 in 8 tensors" in text
    assert record["adapter"]["ranks"] == [8]


def test_a_run_that_trained_all_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "model").mkdir()
    text, record = explain(run, capsys)
    assert "model        model/, all of its weights trained" in text
    assert "the run is not finished" not in text
    assert record["model"] == "model"


def test_a_run_that_has_just_begun(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").unlink()
    assert "none: metrics.jsonl has no whole line" in explain(run, capsys)[0]
    (run / "metrics.jsonl").write_text('{"ste')
    assert "none: metrics.jsonl has no whole line" in explain(run, capsys)[0]


def test_long_metrics_are_read_from_their_end(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = json.dumps({"step": 1, "loss": 1.0}) + "\n"
    (run / "metrics.jsonl").write_text(line * 10_000 + line.replace("1,", "2,"))
    assert "last record  step 2, loss 1.0" in explain(run, capsys)[0]
    (run / "metrics.jsonl").write_text("x" * 200_000)
    assert "lines of at most 65536 bytes expected" in refusal(run, 1, capsys)
    (run / "metrics.jsonl").write_text("not json\n")
    assert "metrics.jsonl, last line: not JSON" in refusal(run, 1, capsys)


def test_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, record = explain(run / "checkpoints" / "step-000010", capsys)
    assert ": a checkpoint\n" in text
    assert "1 in 1 files" in text
    assert "MANIFEST.json, optimizer.safetensors" in text
    assert "! the hashes in MANIFEST.json are checked when a run resumes, not here" in text
    assert record["storage"]["float32"]["num_elements"] == 5


def write_gguf(path: Path, *, named: bool) -> None:
    writer = GGUFWriter(path, "llama")
    if named:
        writer.add_name("Tiny")
        writer.add_block_count(2)
        writer.add_embedding_length(64)
        writer.add_tensor("token_embd.weight", np.zeros((10, 64), np.float32))
        blocks = np.zeros((4, 64 // 32 * 18), np.uint8)  # 32 elements a block of 18 bytes
        writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, named=True)
    text, record = explain(path, capsys, "--tensors")
    for words in (
        ": a GGUF file\n",
        "name        Tiny\n",
        "family      llama\n",
        "2 layers, hidden size 64\n",
        "parameters  896 in 2 tensors\n",
        "F32: 640 in 2.5 KiB; Q4_0: 256 in 144 B",
        f"{8 * (2560 + 144) / 896:.3f} bits a parameter",
        "blk.0.attn_q.weight  Q4_0        4 x 64",
    ):
        assert words in text
    assert record["kind"] == "gguf"
    assert record["bytes"] == 2704
    write_gguf(path, named=False)
    text, _ = explain(path, capsys)
    assert "name        unknown\n" in text
    assert "shape       unknown\n" in text
    path.write_bytes(path.read_bytes()[:20])
    assert "cannot be read as GGUF" in refusal(path, 1, capsys)


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file or directory" in refusal(tmp_path / "none", 1, capsys)
    assert "expected, found nothing" in refusal(tmp_path, 1, capsys)
    (tmp_path / "notes.txt").write_text("x")
    assert "expected, found notes.txt" in refusal(tmp_path, 1, capsys)


@pytest.mark.parametrize("begin", [b"PK\x03\x04", b"\x80\x02}"])
def test_pickles_are_not_opened(
    begin: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"  # whatever its name
    path.write_bytes(begin + b"\0" * 100)
    assert "opening one runs code" in refusal(path, 1, capsys)


def test_a_fifo_is_unsafe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "a regular file expected, found a FIFO" in refusal(
        tmp_path / "model.safetensors", 5, capsys
    )
    assert "found a FIFO" in refusal(tmp_path, 5, capsys)


def test_an_index_that_leaves_its_directory_is_unsafe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = {"weight_map": {"a": "../secret.safetensors"}}
    write_json(tmp_path / "model.safetensors.index.json", index)
    assert "not plain names" in refusal(tmp_path, 5, capsys)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8, b"\xff\xff\xff\xff\xff\xff\xff\x7f{", b"\x02\0\0\0\0\0\0\0{]"],
)
def test_files_that_lie(content: bytes, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "model.safetensors").write_bytes(content)
    assert "is not a valid safetensors file" in refusal(model / "model.safetensors", 1, capsys)
    assert "is not a valid safetensors file" in refusal(model, 1, capsys)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": 1, "a": 2}', "{", "[]", '{"r": NaN}'])
def test_configs_that_lie(
    content: str, model: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "config.json").write_text(content)
    (adapter / "adapter_config.json").write_text(content)
    assert "config.json" in refusal(model, 1, capsys)
    assert "adapter_config.json" in refusal(adapter, 1, capsys)


def test_numbers_beyond_measure(
    model: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = 10**400
    write_json(model / "config.json", {**CONFIG, "hidden_size": huge, "num_hidden_layers": True})
    text, _ = explain(model, capsys)
    assert "hidden size" not in text
    assert "layers" not in text.partition("runs here")[0]
    write_adapter(adapter, r=huge, lora_alpha=huge)
    assert "scaling     unknown" in explain(adapter, capsys)[0]


def test_control_characters_are_shown_not_obeyed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"\x1b[2Jgone\x9b": torch.zeros(1)})
    text, record = explain(path, capsys, "--tensors")
    assert "\\x1b[2Jgone\\x9b" in text
    assert "\x1b" not in text
    assert record["tensors"][0]["name"] == "\x1b[2Jgone\x9b"

"""Opening directories: what transformers writes, 4 bits, and everything that can be wrong."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.errors import FormatError, MissingFileError, UnsupportedError, UsageError
from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.layers.segments import pack
from halfbyte.models.load import load_decoder
from tiny_models import change_config, make_oracle, random_tokens, save_directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_directory(make_oracle("llama"), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    oracle = make_oracle("llama", torch.bfloat16)
    return save_directory(oracle, tmp_path_factory.mktemp("nf4"), four_bit=True)


@pytest.fixture
def copy(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "copy"))


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("resident", [False, True], ids=["mapped", "resident"])
def test_directories_of_transformers(case: str, resident: bool, tmp_path: Path) -> None:
    oracle = make_oracle(case)
    save_directory(oracle, tmp_path)
    tokens = random_tokens(30)
    with torch.no_grad():
        expected = oracle(tokens[None]).logits[0]
    decoder = load_decoder(tmp_path, compute_dtype=torch.float32, resident=resident)
    found = decoder.logits(tokens, pack([30]))
    assert (found - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_four_bit_directories(four_bit: Path) -> None:
    decoder = load_decoder(four_bit, compute_dtype=torch.float32)
    weight = decoder.store.acquire(decoder.linears["model.layers.1.mlp.up_proj"].weight)
    assert isinstance(weight, QuantizedTensor)
    dense = make_oracle("llama", torch.bfloat16)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "_proj.weight" in name:
                parameter.copy_(hb.quantize(parameter).dequantize())
        tokens = random_tokens(30)
        expected = dense.float()(tokens[None]).logits[0]
    found = decoder.logits(tokens, pack([30]))
    # Weights in float32 here, rounded to bfloat16 there: 2^-9 of each weight.
    assert (found - expected).norm() <= 0.02 * expected.norm()
    copied = load_decoder(four_bit, compute_dtype=torch.float32, resident=True)
    assert torch.equal(copied.logits(tokens, pack([30])), found)


def test_mapped_weights_are_the_files_pages(four_bit: Path) -> None:
    first, second = (load_decoder(four_bit) for _ in range(2))
    ref = first.linears["model.layers.0.self_attn.q_proj"].weight
    for decoder in (first, second):
        weight = decoder.store.acquire(ref)
        assert isinstance(weight, QuantizedTensor)
        address = weight.codes.data_ptr()
        maps = Path("/proc/self/maps").read_text().splitlines()
        holder = [
            line
            for line in maps
            if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
        ]
        assert len(holder) == 1
        assert str(four_bit) in holder[0]
        assert holder[0].split()[1] == "r--s"  # read-only, shared


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
)
def test_a_process_that_writes_to_the_base_dies(four_bit: Path, name: str) -> None:
    code = f"""
        from halfbyte.models.load import load_decoder
        decoder = load_decoder({str(four_bit)!r})
        weight = decoder.store.acquire(decoder.linears[{name!r}].weight)
        print("opened", flush=True)
        weight.codes.zero_()
        print("written", flush=True)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert run.stdout == "opened\n"
    assert run.returncode == -signal.SIGSEGV


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    file = SafetensorsFile.open(path)
    tensors = {name: file.read(name) for name in file.entries}
    change(tensors)
    write_safetensors(path, tensors, {"format": "pt"})


def test_all_misfits_are_listed_together(copy: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.3.mlp.up_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["model.norm.weight"] = torch.zeros(47)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    rewrite(copy, damage)
    with pytest.raises(FormatError) as caught:
        load_decoder(copy)
    assert set(caught.value.problems) == {
        "model.layers.3.mlp.up_proj.weight: missing",
        "model.layers.9.mlp.up_proj.weight: not a tensor of this model",
        "model.norm.weight: shape [48] expected, found [47]",
        "lm_head.weight: one of float32, bfloat16, float16 expected, found int32",
    }


def test_four_bit_misfits(four_bit: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(four_bit, tmp_path / "copy"))
    good, bad = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    state = ".quant_state.bitsandbytes__nf4"

    def damage(tensors: dict[str, Tensor]) -> None:
        swapped = {k: v for k, v in tensors.items() if k.startswith(bad)}
        fields = json.loads(bytes(swapped[bad + state].tolist()))
        fields["shape"] = fields["shape"][::-1]
        tensors[bad + state] = torch.frombuffer(
            bytearray(json.dumps(fields).encode()), dtype=torch.uint8
        ).clone()
        tensors[good + ".absmax"] = tensors[good + ".absmax"][:-1].clone()
        embeddings = "model.embed_tokens.weight"
        for name in [k for k in tensors if k.startswith(good)]:
            tensors[name.replace(good, embeddings)] = tensors[name]
        tensors[embeddings + ".absmax"] = tensors[embeddings + ".absmax"].clone()

    rewrite(directory, damage)
    with pytest.raises(FormatError) as caught:
        load_decoder(directory)
    text = str(caught.value)
    assert "model.embed_tokens.weight: only linear layers can be in 4 bits" in text
    assert f"{bad}: shape [48, 80] expected, found [80, 48]" in text
    assert good in text


def test_a_tied_head_may_be_repeated(tmp_path: Path) -> None:
    oracle = make_oracle("llama-biases-tied")
    save_directory(oracle, tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    decoder = load_decoder(tmp_path, compute_dtype=torch.float32)
    tokens = random_tokens(5)
    with torch.no_grad():
        expected = oracle(tokens[None]).logits[0]
    torch.testing.assert_close(decoder.logits(tokens, pack([5])), expected)


def test_directories_that_are_not_models(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="halfbyte quantize"):
        load_decoder(tmp_path / "absent")
    with pytest.raises(UsageError, match="compute_dtype: one of float32, bfloat16, float16"):
        load_decoder(copy, compute_dtype=torch.float64)
    change_config(copy, model_type="mamba")
    with pytest.raises(UnsupportedError, match="known families"):
        load_decoder(copy)
    (copy / "config.json").unlink()
    with pytest.raises(MissingFileError):
        load_decoder(copy)


def test_a_config_that_lies_about_sizes_allocates_nothing(copy: Path) -> None:
    change_config(copy, vocab_size=2**22, hidden_size=2**18)
    with pytest.raises(
        FormatError, match=r"embed_tokens.weight: shape \[4194304, 262144\] expected"
    ):
        load_decoder(copy)


def test_code_in_a_directory_is_never_run(copy: Path) -> None:
    change_config(
        copy, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    )
    (copy / "evil.py").write_text("raise SystemExit('evil ran')")
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04evil")
    code = f"""
        import sys
        from halfbyte.models.load import load_decoder
        seen = []
        def watch(event, arguments):
            if event in ("exec", "compile", "import", "os.system", "subprocess.Popen", "socket.connect"):
                seen.append(event + str(arguments))
            if event == "open":
                seen.append("open " + str(arguments[0]))
        sys.addaudithook(watch)
        decoder = load_decoder({str(copy)!r})
        print([line for line in seen if "evil" in line or ".bin" in line or "os.system" in line
               or "Popen" in line or "socket" in line], decoder.config.notes)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("[] (")
    assert "never run" in run.stdout

import json
from pathlib import Path

import pytest

from halfbyte.cli.app import run
from halfbyte.cli.quantize import PICTURE, parse_size
from halfbyte.errors import UsageError
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.models.quantize_model import REPORT
from tiny_tokenizers import write_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    import torch  # noqa: PLC0415

    from halfbyte.models.config import parse_config  # noqa: PLC0415
    from halfbyte.models.layout import layout_of  # noqa: PLC0415

    config = {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    directory = write_model(tmp_path / "source")
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {ref.name: torch.randn(ref.shape) for ref in layout_of(parse_config(config)).refs()}
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def test_json_and_report(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["quantize", str(source), str(out), "--json", "--report", "--codebook", "fp4"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["path"] == str(out)
    assert record["num_quantized"] == 7
    assert record["error"]["num_elements"] == sum([32 * 32 * 4, 32 * 64 * 3])
    assert "7 weights in 4 bits" in captured.err
    assert "q_proj" in captured.err
    assert (out / REPORT).is_file()
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "fp4"


def test_options_reach_the_quantizer(source: Path, tmp_path: Path) -> None:
    options = [
        "--block-size",
        "128",
        "--no-double-quant",
        "--keep",
        "*.q_proj",
        "--keep",
        "*.k_proj",
    ]
    options += ["--shard-size", "3KB"]
    assert run(["quantize", str(source), str(tmp_path / "out"), *options]) == 0
    record = json.loads((tmp_path / "out" / "halfbyte.json").read_text())
    assert record["quantizer"] == {
        "codebook": "nf4",
        "block_size": 128,
        "double_quant": False,
        "keep": ["*.q_proj", "*.k_proj"],
    }
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert run(["quantize", str(source), str(tmp_path / "out")]) == 1
    assert run(["quantize", str(source), str(tmp_path / "out"), "--replace"]) == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("2 GiB", 2 << 30), ("500mb", 5 * 10**8), ("1000", 1000), ("7KiB", 7168)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "5TB", "-1", "1.5GB", "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="a size such as 5GB"):
        parse_size(text)

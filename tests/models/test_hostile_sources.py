"""Model directories of strangers: refused with every fault listed, none of their code run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import FormatError, HalfbyteError, UnsafeArtifactError, UnsupportedError
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.models.config import parse_config
from halfbyte.models.layout import layout_of
from halfbyte.models.quantize_model import quantize_model
from tiny_tokenizers import write_model

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def tensors() -> dict[str, torch.Tensor]:
    refs = layout_of(parse_config(CONFIG)).refs()
    return {ref.name: torch.ones(ref.shape, dtype=torch.bfloat16) for ref in refs}


def config(directory: Path, **changes: object) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))


def rewrite(directory: Path, changed: dict[str, torch.Tensor]) -> None:
    write_safetensors(directory / "model.safetensors", changed)


def to_bin(directory: Path, value: object) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(value, directory / "pytorch_model.bin")


def index(directory: Path, target: str, kind: str = "safetensors") -> None:
    (directory / "model.safetensors").unlink()
    single = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = json.dumps({"weight_map": dict.fromkeys(tensors(), target)})
    (directory / f"{single}.{kind}.index.json").write_text(weight_map)


class Payload:
    """A pickle that would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def pickle_code(directory: Path) -> None:
    to_bin(directory, {**tensors(), "x": Payload(directory.parent / "marker")})


def legacy_pickle_code(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    payload = {"x": Payload(directory.parent / "marker")}
    torch.save(payload, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors().items() if name not in names}


Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"

HOSTILE: dict[str, tuple[Callable[[Path], object], type[HalfbyteError], str]] = {
    "auto-map": (
        lambda d: config(d, auto_map={"AutoConfig": "x.C"}),
        UnsafeArtifactError,
        "auto_map",
    ),
    "unknown-family": (
        lambda d: config(d, model_type="martian"),
        UnsupportedError,
        "known families: llama",
    ),
    "quantized": (
        lambda d: config(d, quantization_config={"quant_method": "gptq"}),
        UnsupportedError,
        "quantized already: 'gptq'",
    ),
    "enormous-config": (
        lambda d: config(d, num_hidden_layers=10**9),
        FormatError,
        "num_hidden_layers",
    ),
    "config-not-json": (lambda d: (d / "config.json").write_text("{"), FormatError, "not JSON"),
    "missing": (
        lambda d: rewrite(d, without(Q, K)),
        FormatError,
        r"2 problems[^$]*k_proj\.weight: missing",
    ),
    "extra": (
        lambda d: rewrite(d, tensors() | {"model.evil": torch.ones(1)}),
        FormatError,
        "'model.evil': not a tensor of this model",
    ),
    "shape": (
        lambda d: rewrite(d, tensors() | {Q: torch.ones(3, 32), K: torch.ones(2, 2)}),
        FormatError,
        r"2 problems[^$]*shape \[32, 32\] expected, found \[3, 32\]",
    ),
    "integers": (
        lambda d: rewrite(d, tensors() | {Q: torch.ones(32, 32, dtype=torch.int32)}),
        FormatError,
        "found int32",
    ),
    "truncated": (
        lambda d: os.truncate(
            d / "model.safetensors", (d / "model.safetensors").stat().st_size - 9
        ),
        FormatError,
        "not a valid safetensors file",
    ),
    "outside": (lambda d: index(d, "../secret.safetensors"), UnsafeArtifactError, r"\.\./secret"),
    "absent-shard": (
        lambda d: index(d, "gone.safetensors"),
        FormatError,
        "missing from the directory",
    ),
    "tokenizer-device": (
        lambda d: (d / "merges.txt").symlink_to("/dev/zero"),
        UnsafeArtifactError,
        "device",
    ),
    "pickle": (pickle_code, UnsafeArtifactError, "asks for more than tensors"),
    "legacy-pickle": (legacy_pickle_code, FormatError, "before 1.6"),
    "bin-outside": (lambda d: index(d, "../x.bin", "bin"), UnsafeArtifactError, r"\.\./x\.bin"),
    "bin-absent": (lambda d: index(d, "x.bin", "bin"), FormatError, "missing from the directory"),
    "bin-map": (
        lambda d: (
            (d / "model.safetensors").unlink(),
            (d / "pytorch_model.bin.index.json").write_text("{}"),
        ),
        FormatError,
        "weight_map",
    ),
    "bin-list": (lambda d: to_bin(d, [1]), FormatError, "named tensors expected, found list"),
    "bin-values": (
        lambda d: to_bin(d, tensors() | {"x": 3, "y": torch.ones(1).long()}),
        FormatError,
        r"2 problems[^$]*'x': a named tensor expected, found int[^$]*floating",
    ),
    "bin-garbage": (
        lambda d: (
            (d / "model.safetensors").unlink(),
            (d / "pytorch_model.bin").write_bytes(b"x" * 99),
        ),
        FormatError,
        "damaged",
    ),
}


def source(tmp_path: Path) -> Path:
    directory = write_model(
        tmp_path / "source", template="{% for i in range(10**9) %}a{% endfor %}"
    )
    config(directory)
    rewrite(directory, tensors())
    (directory / "x.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    return directory


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_directories_are_refused(tmp_path: Path, name: str) -> None:
    change, kind, message = HOSTILE[name]
    directory = source(tmp_path)
    change(directory)
    with pytest.raises(kind, match=message):
        quantize_model(directory, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


WATCH = """
import sys
from pathlib import Path
from halfbyte.errors import HalfbyteError
from halfbyte.models.quantize_model import quantize_model
import torch  # and all that loading needs, before the watch begins
import torch._weights_only_unpickler, huggingface_hub
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
def watch(event, args):
    if event in FORBIDDEN:
        print("FORBIDDEN", event, args)
    if event == "import" and args[1] and str(args[1]).startswith(sys.argv[1]):
        print("FORBIDDEN import", args)
    if event in ("exec", "compile") and sys.argv[1] in str(args):
        print("FORBIDDEN", event)
sys.addaudithook(watch)
for source in sorted(Path(sys.argv[1]).glob("*/source")):
    try:
        quantize_model(source, source.parent / "out")
        print("quantized", source.parent.name)
    except HalfbyteError as error:
        print("refused", source.parent.name)
"""


def test_no_code_of_theirs_is_run(tmp_path: Path) -> None:
    for name, (change, _, _) in HOSTILE.items():
        (tmp_path / name).mkdir()
        change(source(tmp_path / name))
    (tmp_path / "template").mkdir()
    source(tmp_path / "template")  # a template bomb is copied, and refused when it is rendered
    result = subprocess.run(
        [sys.executable, "-c", WATCH, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert not [line for line in lines if "FORBIDDEN" in line]
    assert sorted(lines) == sorted([f"refused {n}" for n in HOSTILE] + ["quantized template"])
    assert not list(tmp_path.glob("*/marker"))

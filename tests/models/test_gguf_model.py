"""GGUF models under Hugging Face's names, against weights that are known."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny_gguf as tiny
from halfbyte.errors import FormatError, UnsupportedError
from halfbyte.formats.gguf_file import GgufFile
from halfbyte.models.config import parse_config
from halfbyte.models.gguf_model import ARCHITECTURES, GgufModel
from halfbyte.models.layout import layout_of

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, LAYERS = 16, 24, 4, 2, 8, 11, 2
THETA = 500_000.0  # of Llama 3


def metadata(key: str, **changes: tiny.Typed) -> dict[str, tiny.Typed]:
    pairs: dict[str, tiny.Typed] = {
        "general.architecture": ("str", key),
        f"{key}.embedding_length": ("u32", HIDDEN),
        f"{key}.feed_forward_length": ("u32", INNER),
        f"{key}.block_count": ("u32", LAYERS),
        f"{key}.attention.head_count": ("u32", HEADS),
        f"{key}.attention.head_count_kv": ("u32", KV_HEADS),
        f"{key}.attention.key_length": ("u32", HEAD_DIM),
        f"{key}.context_length": ("u32", 64),
        f"{key}.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        f"{key}.rope.freq_base": ("f32", 10_000.0),
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
    }
    if key == "gemma3":
        pairs[f"{key}.attention.sliding_window"] = ("u32", 4)
        pairs[f"{key}.rope.freq_base"] = ("f32", 1_000_000.0)
    return pairs | {f"{key}.{name.replace('__', '.')}": v for name, v in changes.items()}


def their_names(key: str) -> dict[str, str]:
    """Hugging Face's module -> llama.cpp's, by the published tables of the gguf package."""
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES  # noqa: PLC0415
    from gguf.tensor_mapping import get_tensor_name_map  # noqa: PLC0415

    arch = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == key)
    table = get_tensor_name_map(arch, LAYERS)
    config = parse_config(hugging_face_config(key))
    return {
        ref.name: str(table.get_name(ref.name, try_suffixes=(".weight", ".bias")))
        for ref in layout_of(config).refs()
    }


def hugging_face_config(key: str) -> dict[str, Any]:
    return {
        "model_type": ARCHITECTURES[key].model_type,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4,
        "tie_word_embeddings": False,
    }


def as_stored(name: str, tensor: Tensor, key: str) -> np.ndarray:
    """What llama.cpp's converter makes of a tensor, as its documentation describes it."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if key == "llama" and heads:
        # Of each head, first the first rows of both halves, then the second rows, ...
        halves = tensor.view(heads, 2, HEAD_DIM // 2, -1)
        rows = [
            halves[h, half, i]
            for h in range(heads)
            for i in range(HEAD_DIM // 2)
            for half in (0, 1)
        ]
        tensor = torch.stack(rows).view(tensor.shape)
    if key == "gemma3" and name.endswith("norm.weight"):
        tensor = tensor + 1
    return tensor.numpy()


def write(path: Path, key: str, *, drop: str = "", **changes: tiny.Typed) -> dict[str, Tensor]:
    """A random model in a GGUF file; returns its weights under Hugging Face's names."""
    generator = torch.Generator().manual_seed(3)
    config = parse_config(hugging_face_config(key))
    weights = {
        ref.name: torch.randn(ref.shape, generator=generator).bfloat16().float()
        for ref in layout_of(config).refs()
        if ref.name != drop
    }
    names = their_names(key)
    infos = [tiny.tensor(names[n], as_stored(n, w, key)) for n, w in weights.items()]
    path.write_bytes(tiny.build(metadata(key, **changes), infos))
    return weights


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_names_order_and_values_are_restored(tmp_path: Path, key: str) -> None:
    weights = write(tmp_path / "m.gguf", key)
    model = GgufModel(GgufFile.open(tmp_path / "m.gguf"))
    assert model.names.keys() == weights.keys()
    for name, weight in weights.items():
        assert model.shape(name) == weight.shape
        assert torch.equal(model.read(name), weight.bfloat16()), name


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_the_config_describes_the_same_model(tmp_path: Path, key: str) -> None:
    write(tmp_path / "m.gguf", key)
    model = GgufModel(GgufFile.open(tmp_path / "m.gguf"))
    ours, known = parse_config(model.config), parse_config(hugging_face_config(key))
    for field in ("family", "hidden_size", "intermediate_size", "num_layers", "head_dim", "tied"):
        assert getattr(ours, field) == getattr(known, field), field
    for field in ("num_heads", "num_key_value_heads", "vocabulary_size", "rotary", "local_rotary"):
        assert getattr(ours, field) == getattr(known, field), field
    assert ours.norm_eps == pytest.approx(1e-5)
    if key == "gemma3":
        assert ours.windows == known.windows
        assert ours.attention_scale == HEAD_DIM**-0.5
    assert model.generation_config() == {"bos_token_id": 1, "eos_token_id": 2}
    transformers = pytest.importorskip("transformers")
    settings = {k: v for k, v in model.config.items() if k != "model_type"}
    transformers.AutoConfig.for_model(model.config["model_type"], **settings)


def test_tied_heads_and_mistral(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", drop="lm_head.weight", attention__sliding_window=("u32", 9))
    model = GgufModel(GgufFile.open(tmp_path / "m.gguf"))
    assert model.config["tie_word_embeddings"] is True
    assert (model.config["model_type"], model.config["sliding_window"]) == ("mistral", 9)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"rope__scaling__type": ("str", "linear"), "rope__scaling__factor": ("f32", 4.0)},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "rope__scaling__type": ("str", "yarn"),
                "rope__scaling__factor": ("f32", 4.0),
                "rope__scaling__original_context_length": ("u32", 16),
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
        ({"rope__scaling__type": ("str", "none")}, None),
    ],
)
def test_rope_scaling(tmp_path: Path, changes: dict[str, tiny.Typed], expected: object) -> None:
    write(tmp_path / "m.gguf", "llama", **changes)
    assert GgufModel(GgufFile.open(tmp_path / "m.gguf")).config.get("rope_scaling") == expected


def llama3_divisors(factor: float) -> np.ndarray:
    """By the formula of Llama 3's own code: wavelengths between 2048 and 8192 are blended."""
    divisors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * math.pi * THETA ** (i / HEAD_DIM)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_divisors(tmp_path: Path, factor: float) -> None:
    pairs = metadata("llama", rope__freq_base=("f32", THETA))
    infos = [
        tiny.tensor("token_embd.weight", np.ones((VOCABULARY, HIDDEN))),
        tiny.tensor("rope_freqs.weight", llama3_divisors(factor)),
    ]
    (tmp_path / "m.gguf").write_bytes(tiny.build(pairs, infos))
    scaling = GgufModel(GgufFile.open(tmp_path / "m.gguf")).config["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    infos[1] = tiny.tensor("rope_freqs.weight", np.array([1.0, 2.0, 3.0, 9.0]))
    (tmp_path / "m.gguf").write_bytes(tiny.build(pairs, infos))
    with pytest.raises(UnsupportedError, match="not the divisors of Llama 3"):
        GgufModel(GgufFile.open(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("pairs", "infos", "message"),
    [
        ({"general.architecture": ("str", "mamba")}, [], "one of llama, qwen2, qwen3, gemma3"),
        ({}, [], "general.architecture"),
        (metadata("llama"), [tiny.tensor("blk.0.ssm_a", np.ones(3))], "'blk.0.ssm_a'"),
        (metadata("llama") | {"llama.block_count": ("str", "x")}, [], "int expected, found 'x'"),
        (metadata("llama") | {"llama.block_count": ("i32", -1)}, [], "a count expected, found -1"),
        ({"general.architecture": ("str", "llama")}, [], "found nothing"),
        (metadata("llama") | {"llama.rope.freq_base": ("f32", math.nan)}, [], "a finite number"),
        (
            metadata(
                "llama", rope__scaling__type=("str", "su"), rope__scaling__factor=("f32", 2.0)
            ),
            [],
            "found 'su'",
        ),
        (
            metadata("llama"),
            [tiny.tensor("blk.0.attn_q.weight", np.ones((3, HIDDEN)))],
            "found 3 rows",
        ),
    ],
)
def test_files_that_are_no_model_of_ours(
    tmp_path: Path, pairs: dict[str, tiny.Typed], infos: list[tiny.Info], message: str
) -> None:
    (tmp_path / "m.gguf").write_bytes(tiny.build(pairs, infos))
    with pytest.raises((FormatError, UnsupportedError), match=message):
        GgufModel(GgufFile.open(tmp_path / "m.gguf"))

"""`config.json`: both spellings of what exists, every fault named, nothing run."""

from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import FormatError, MissingFileError, UnsupportedError
from halfbyte.layers.rotary import RotarySpec
from halfbyte.models.config import parse_config, read_config
from halfbyte.models.families import FAMILIES
from tiny_models import LLAMA3, SIZES, YARN

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def test_the_least_that_a_llama_file_says() -> None:
    config = parse_config(LLAMA)
    assert config.family == FAMILIES["llama"]
    assert (config.num_key_value_heads, config.head_dim, config.tied) == (4, 16, False)
    assert config.rotary == RotarySpec(10_000.0)
    assert config.windows == (None, None)
    assert config.attention_scale == 0.25
    assert config.eos_ids == ()


def test_stop_tokens_of_the_generation_config_win() -> None:
    values = LLAMA | {"eos_token_id": 2, "bos_token_id": 1}
    assert parse_config(values).eos_ids == (2,)
    assert parse_config(values, {"eos_token_id": [5, 2]}).eos_ids == (5, 2)
    assert parse_config(values, {}).eos_ids == (2,)
    assert parse_config(values).bos_ids == (1,)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}},
        ),
        (
            {
                "rope_theta": 500.0,
                "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
            },
            {"rope_parameters": LLAMA3},
        ),
        ({"rope_scaling": YARN}, {"rope_parameters": YARN}),
        ({"rope_scaling": None}, {}),
    ],
)
def test_both_spellings_of_rotary_settings(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert parse_config(LLAMA | old) == parse_config(LLAMA | new)


def test_gemma_has_two_rotary_bases_in_both_spellings() -> None:
    gemma = SIZES | {"model_type": "gemma3_text", "rms_norm_eps": 1e-6, "sliding_window": 8}
    old = parse_config(
        gemma | {"rope_theta": 2e6, "rope_local_base_freq": 3e4, "sliding_window_pattern": 2}
    )
    layers = ["sliding_attention", "full_attention"] * 2
    full = {"rope_type": "default", "rope_theta": 2e6}
    sliding = {"rope_type": "default", "rope_theta": 3e4}
    new = parse_config(
        gemma
        | {
            "layer_types": layers,
            "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        }
    )
    assert old == new
    assert [new.rotary_of(i).theta for i in range(4)] == [3e4, 2e6, 3e4, 2e6]
    assert new.windows == (8, None, 8, None)
    gemma.pop("tie_word_embeddings")
    assert parse_config(gemma).tied
    assert parse_config(gemma).rotary_of(3).theta == 1e4


def test_an_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"'mamba'.*llama, mistral, qwen2, qwen3, gemma3"):
        parse_config({"model_type": "mamba"})
    with pytest.raises(FormatError, match="model_type: a string expected, found nothing"):
        parse_config({})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"hidden_size": None}, "hidden_size: a whole number from 1"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: a whole number from 1 to 1024"),
        ({"num_key_value_heads": 3}, "a divisor of 4 heads expected, found 3"),
        ({"head_dim": 15}, "head_dim: an even number"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: a number above 0 up to 1"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"hidden_act": "relu"}, "hidden_act: one of silu, gelu_pytorch_tanh"),
        ({"attention_bias": "yes"}, "attention_bias: true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: true or false"),
        ({"eos_token_id": 32000}, "eos_token_id: token ids from 0 to 31999"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"rope_theta": 1.0}, "rope_theta: a number above 1"),
        ({"rope_scaling": []}, "rope_scaling: an object"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type: one of default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor: a number from 1"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "a number above low_freq_factor 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 1"),
        ({"use_bidirectional_attention": True}, "attention here is causal"),
        ({"quantization_config": {"quant_method": "gptq"}}, "4 bits by bitsandbytes"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "4 bits by bitsandbytes",
        ),
    ],
)
def test_faults_are_named(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(FormatError, match=fault) as caught:
        parse_config(LLAMA | changes)
    assert len(caught.value.problems) == len(set(caught.value.problems))


def test_windows_need_a_size_and_known_kinds() -> None:
    gemma = SIZES | {"model_type": "gemma3_text", "rms_norm_eps": 1e-6}
    with pytest.raises(FormatError, match="sliding_window: a window expected, found nothing"):
        parse_config(gemma)
    kinds = ["full_attention", "chunked_attention"] * 2
    with pytest.raises(FormatError, match="found \\['chunked_attention'\\]"):
        parse_config(gemma | {"sliding_window": 4, "layer_types": kinds})
    with pytest.raises(FormatError, match="layer_types: a list of 4 strings"):
        parse_config(gemma | {"sliding_window": 4, "layer_types": ["full_attention"]})


def test_all_problems_come_at_once() -> None:
    with pytest.raises(FormatError) as caught:
        parse_config({"model_type": "qwen3", "hidden_act": "tanh", "vocab_size": 0})
    named = {problem.split(":")[0] for problem in caught.value.problems}
    assert named == {
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "hidden_act",
        "intermediate_size",
        "rms_norm_eps",
    }


def test_code_named_by_a_file_is_noted_and_never_run() -> None:
    config = parse_config(LLAMA | {"auto_map": {"AutoModel": "evil.Model"}})
    assert "auto_map" in config.notes[0]
    assert parse_config(LLAMA).notes == ()


def test_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(FormatError):
        read_config(tmp_path)

"""The model inside a GGUF file as Hugging Face names it: config and tensors.

llama.cpp stores some tensors otherwise than Hugging Face:
  - `llama`: rows of the query and key projections are reordered within each head, so that the
    two halves of a rotated pair lie side by side;
  - `gemma3`: norm weights have 1 added;
  - `llama` with rope scaling of Llama 3: its divisors are a tensor, `rope_freqs.weight`.

Source: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py (both ways of
naming and the changes to tensors).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import FormatError, UnsupportedError
from halfbyte.formats.gguf_file import GgufFile
from halfbyte.models.gguf_tokenizer import end_ids

ROPE_DIVISORS = "rope_freqs.weight"

_PLAIN = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")

# Llama 3 names these in no metadata; every model of it has them.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192
_DIVISOR_TOLERANCE = 1e-3
_GEMMA_27B_LAYERS = 62


@dataclass(frozen=True, slots=True)
class Architecture:
    """One `general.architecture`.

    Attributes:
        model_type: What Hugging Face calls it.
        layer_names: Tensor within a layer -> module.
        pairs_adjacent: Rows of query and key projections are reordered.
        norm_plus_one: Norm weights have 1 added.
    """

    model_type: str
    layer_names: Mapping[str, str]
    pairs_adjacent: bool = False
    norm_plus_one: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", _PLAIN, pairs_adjacent=True),
    "qwen2": Architecture("qwen2", _PLAIN),
    "qwen3": Architecture("qwen3", _PLAIN | _QK_NORM),
    "gemma3": Architecture(
        "gemma3_text",
        {
            **_PLAIN,
            **_QK_NORM,
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_plus_one=True,
    ),
}
"""By `general.architecture`; Mistral's files say `llama`."""

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


class GgufModel:
    """Config and tensors of a GGUF file under Hugging Face's names.

    Attributes:
        names: Hugging Face's name -> the file's.
        config: What `config.json` says.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        architecture = file.get("general.architecture", str)
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UnsupportedError(
                f"{file.path}: general.architecture: one of {known} expected, "
                f"found {architecture!r}"
            )
        self._key = architecture
        self._rules = ARCHITECTURES[architecture]
        self.names = self._named()
        self.config: dict[str, object] = self._config()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, by Hugging Face's name."""
        return self.file.entries[self.names[name]].shape

    def read(self, name: str) -> Tensor:
        """A tensor by Hugging Face's name and in its order, bfloat16.

        The model that a GGUF file stands for is the one that its bfloat16 copy would be, so both
        quantize to the same bytes.
        """
        own = self.names[name]
        if self._rules.norm_plus_one and name.endswith("norm.weight"):
            return (self.file.read(own) - 1).bfloat16()
        tensor = self.file.read(own, dtype=torch.bfloat16)
        if self._rules.pairs_adjacent and ".self_attn.q_proj." in name:
            return _halves_apart(tensor, self._heads)
        if self._rules.pairs_adjacent and ".self_attn.k_proj." in name:
            return _halves_apart(tensor, self._key_value_heads)
        return tensor

    def generation_config(self) -> dict[str, object]:
        """What `generation_config.json` says."""
        roles = {"bos_token_id": "bos", "pad_token_id": "padding"}
        ids: dict[str, object] = {key: self._token_id(name) for key, name in roles.items()}
        ends = end_ids(self.file)
        if ends:
            ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        return {key: value for key, value in ids.items() if value is not None}

    def _named(self) -> dict[str, str]:
        names: dict[str, str] = {}
        problems: list[str] = []
        for theirs in self.file.entries:
            match = _IN_LAYER.fullmatch(theirs)
            if theirs in _OUTSIDE:
                names[_OUTSIDE[theirs]] = theirs
            elif match and match[2] in self._rules.layer_names:
                module = self._rules.layer_names[match[2]]
                names[f"model.layers.{int(match[1])}.{module}.{match[3]}"] = theirs
            elif theirs != ROPE_DIVISORS:
                problems.append(f"{theirs!r:.80}: not a tensor of a {self._key} model")
        if problems:
            raise UnsupportedError(
                f"{self.file.path}: tensors that are not known", problems=problems[:20]
            )
        return names

    def _config(self) -> dict[str, object]:
        number, real = self._integer, self._real
        heads = self._heads = number("attention.head_count")
        hidden = number("embedding_length")
        self._key_value_heads = number("attention.head_count_kv", heads)
        head_dim = number(
            "attention.key_length", number("rope.dimension_count", hidden // max(heads, 1))
        )
        for projection, count in (("q", heads), ("k", self._key_value_heads)):
            self._require_heads(projection, count, head_dim)
        embeddings = self.file.entries.get("token_embd.weight")
        window = number("attention.sliding_window", 0)
        model_type = self._rules.model_type
        if model_type == "llama" and window:
            model_type = "mistral"
        config: dict[str, object] = {
            "architectures": [_CLASSES[model_type]],
            "model_type": model_type,
            "dtype": "bfloat16",
            "hidden_size": hidden,
            "intermediate_size": number("feed_forward_length"),
            "num_hidden_layers": number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._key_value_heads,
            "head_dim": head_dim,
            "max_position_embeddings": number("context_length"),
            "rms_norm_eps": round(real("attention.layer_norm_rms_epsilon"), 12),
            "rope_theta": real("rope.freq_base", 10_000.0),
            "tie_word_embeddings": "lm_head.weight" not in self.names,
            "vocab_size": embeddings.shape[0] if embeddings else 0,
        }
        if scaling := self._rope_scaling(head_dim, real("rope.freq_base", 10_000.0)):
            config["rope_scaling"] = scaling
        has_bias = "model.layers.0.self_attn.q_proj.bias" in self.names
        if model_type in ("llama", "qwen3"):
            config["attention_bias"] = has_bias
        if model_type == "gemma3_text":
            config |= self._gemma(hidden, heads, head_dim, window)
        else:
            config["hidden_act"] = "silu"
        if model_type == "mistral":
            config["sliding_window"] = window
        for key, name in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
            config[key] = self._token_id(name)
        config["eos_token_id"] = self._token_id("eos")
        return config

    def _gemma(self, hidden: int, heads: int, head_dim: int, window: int) -> dict[str, object]:
        layers = self._integer("block_count")
        scalar = hidden // heads if layers == _GEMMA_27B_LAYERS else head_dim
        pattern = self._integer("attention.sliding_window_pattern", 6)
        kinds = [
            "sliding_attention" if (i + 1) % max(1, pattern) else "full_attention"
            for i in range(min(layers, 1024))
        ]
        return {
            "attention_bias": False,
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": kinds,
            "query_pre_attn_scalar": scalar,
            "rope_local_base_freq": self._real("rope.freq_base_swa", 10_000.0),
            "sliding_window": window,
        }

    def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, object] | None:
        kind = self.file.get(f"{self._key}.rope.scaling.type", str)
        if ROPE_DIVISORS in self.file.entries:
            return self._llama3_scaling(head_dim, theta)
        if kind in (None, "none"):
            return None
        scaling: dict[str, object] = {
            "rope_type": kind,
            "factor": self._real("rope.scaling.factor"),
        }
        if kind == "yarn":
            original = self._integer("rope.scaling.original_context_length")
            scaling["original_max_position_embeddings"] = original
        elif kind != "linear":
            raise UnsupportedError(
                f"{self.file.path}: rope.scaling.type: none, linear or yarn expected, "
                f"found {kind!r:.40}"
            )
        return scaling

    def _llama3_scaling(self, head_dim: int, theta: float) -> dict[str, object]:
        """The settings that give the file's divisors, found by trying the only ones in use."""
        found = self.file.read(ROPE_DIVISORS)
        factor = round(float(found.max()), 4)
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        turns = _LLAMA3_ORIGINAL / (2 * math.pi * theta**exponents)
        smooth = ((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)).clamp(0, 1)
        expected = 1 / ((1 - smooth) / max(factor, 1) + smooth)
        if found.shape != expected.shape or not torch.allclose(
            found.double(), expected, rtol=_DIVISOR_TOLERANCE
        ):
            raise UnsupportedError(
                f"{self.file.path}: {ROPE_DIVISORS}: not the divisors of Llama 3's rope scaling"
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LLAMA3_LOW,
            "high_freq_factor": _LLAMA3_HIGH,
            "original_max_position_embeddings": _LLAMA3_ORIGINAL,
        }

    def _require_heads(self, projection: str, count: int, head_dim: int) -> None:
        entry = self.file.entries.get(f"blk.0.attn_{projection}.weight")
        if entry is not None and entry.shape[0] != count * head_dim:
            raise FormatError(
                f"{self.file.path}: blk.0.attn_{projection}.weight: {count} heads of {head_dim} "
                f"features expected by the metadata, found {entry.shape[0]} rows"
            )

    def _token_id(self, name: str) -> int | None:
        return self.file.get(f"tokenizer.ggml.{name}_token_id", int)

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self.file.get(f"{self._key}.{key}", int)
        if value is None:
            value = default
        if value is None or value < 0:
            raise FormatError(
                f"{self.file.path}: {self._key}.{key}: a count expected, found "
                f"{'nothing' if value is None else value}"
            )
        return value

    def _real(self, key: str, default: float | None = None) -> float:
        value = self.file.get(f"{self._key}.{key}", float)
        if value is None:
            value = default
        if value is None or not math.isfinite(value):
            raise FormatError(
                f"{self.file.path}: {self._key}.{key}: a finite number expected, found "
                f"{'nothing' if value is None else value}"
            )
        return value


def _halves_apart(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs side by side to first halves, then second halves."""
    rest = tensor.shape[1:]
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *rest)
    return pairs.transpose(1, 2).reshape(tensor.shape)

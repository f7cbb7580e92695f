"""What a decoder needs to know about a model, parsed strictly from `config.json`.

Everything needed must be there and in range; what would change the computation and is not
supported is refused; code that a file names (`auto_map`) is never run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import FormatError
from halfbyte.layers.activation import ACTIVATIONS
from halfbyte.layers.rotary import RotarySpec
from halfbyte.models.families import Family, Switch, find_family
from halfbyte.models.fields import Fields
from halfbyte.models.rotary_config import parse_rotary
from halfbyte.storage.json_file import read_json_object

MAX_LAYERS, MAX_HEADS, MAX_FEATURES, MAX_VOCABULARY = 1024, 1024, 2**18, 2**22
MAX_POSITIONS = 2**31 - 1
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a decoder. Valid once parsed.

    Attributes:
        family: Which parts it has.
        hidden_size: Features of the residual stream.
        intermediate_size: Features inside the feed-forward layers.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_key_value_heads: Key-value heads; divides `num_heads`.
        head_dim: Features of a head, even.
        vocabulary_size: Rows of embeddings and head.
        max_positions: The context length it is meant for.
        norm_eps: Added to mean squares.
        activation: A key of `layers.activation.ACTIVATIONS`.
        qkv_bias: Whether query, key and value projections have biases.
        output_bias: Whether the attention's output projection has one.
        mlp_bias: Whether the feed-forward projections have biases.
        tied: Whether the head is the embeddings.
        rotary: How positions become angles.
        local_rotary: The same for windowed layers, when it differs.
        windows: Sliding window of each layer; None sees everything.
        attention_scale: Multiplies query-key products.
        attention_softcap: See `AttentionSpec.softcap`.
        logit_softcap: The same for logits.
        bos_ids: Tokens that begin a text; empty if there is none.
        eos_ids: Tokens that end generation.
        notes: What the file asks for and does not get.
    """

    family: Family
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocabulary_size: int
    max_positions: int
    norm_eps: float
    activation: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool
    rotary: RotarySpec
    local_rotary: RotarySpec | None
    windows: tuple[int | None, ...]
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def rotary_of(self, layer: int) -> RotarySpec:
        """How positions become angles in that layer."""
        if self.local_rotary is not None and self.windows[layer] is not None:
            return self.local_rotary
        return self.rotary


def read_config(directory: Path) -> ModelConfig:
    """The config of a model directory; stop tokens from `generation_config.json` if it has some.

    Raises:
        MissingFileError: There is no `config.json`.
        UnsupportedError: Unknown family.
        FormatError: Every other fault, all at once.
    """
    values = read_json_object(directory / "config.json")
    generation = directory / "generation_config.json"
    overrides = read_json_object(generation) if generation.is_file() else {}
    return parse_config(values, overrides, where=str(directory))


def parse_config(
    values: Mapping[str, object],
    generation: Mapping[str, object] | None = None,
    *,
    where: str = "config.json",
) -> ModelConfig:
    """A config from the object in `config.json`.

    Args:
        values: That object.
        generation: The one in `generation_config.json`.
        where: What to call it in errors.

    Raises:
        UnsupportedError: Unknown family.
        FormatError: Every other fault, all at once.
    """
    problems: list[str] = []
    fields = Fields(values, problems)
    model_type = fields.text("model_type")
    if not model_type:
        raise FormatError(f"{where} does not describe a model we can run", problems=problems)
    family = find_family(model_type)
    hidden = fields.integer("hidden_size", 1, MAX_FEATURES)
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    num_kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, default=num_heads)
    if num_heads % num_kv_heads:
        fields.fault("num_key_value_heads", f"a divisor of {num_heads} heads")
    head_dim = fields.integer(
        "head_dim", 2, 1024, default=family.head_dim or max(2, hidden // num_heads)
    )
    if head_dim % 2:
        problems.append(f"head_dim: an even number expected, found {head_dim}")
    vocabulary = fields.integer("vocab_size", 1, MAX_VOCABULARY)
    max_positions = fields.integer("max_position_embeddings", 1, MAX_POSITIONS)
    activation = fields.text(family.activation_key, default="silu")
    if activation not in ACTIVATIONS:
        fields.fault(family.activation_key, f"one of {', '.join(ACTIVATIONS)}")
    rotary, local_rotary = parse_rotary(fields, family, max_positions)
    scale = fields.number("query_pre_attn_scalar", 256.0) if family.query_scalar else head_dim
    eos_ids = fields.token_ids("eos_token_id", vocabulary)
    if generation is not None:
        later = Fields(generation, problems, where="generation_config.json: ")
        eos_ids = later.token_ids("eos_token_id", vocabulary) or eos_ids
    _refuse_unsupported(fields)
    config = ModelConfig(
        family=family,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_FEATURES),
        num_layers=num_layers,
        num_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        vocabulary_size=vocabulary,
        max_positions=max_positions,
        norm_eps=fields.number("rms_norm_eps", high=1.0),
        activation=activation,
        qkv_bias=_switch(family.qkv_bias, fields, "attention_bias"),
        output_bias=_switch(family.output_bias, fields, "attention_bias"),
        mlp_bias=_switch(family.mlp_bias, fields, "mlp_bias"),
        tied=fields.flag("tie_word_embeddings", default=family.tied),
        rotary=rotary,
        local_rotary=local_rotary,
        windows=_windows(fields, family, num_layers),
        attention_scale=scale**-0.5,
        attention_softcap=_softcap(fields, family, "attn_logit_softcapping"),
        logit_softcap=_softcap(fields, family, "final_logit_softcapping"),
        bos_ids=fields.token_ids("bos_token_id", vocabulary),
        eos_ids=eos_ids,
        notes=_notes(values),
    )
    if problems:
        unique = tuple(dict.fromkeys(problems))  # a key that decides two things is read twice
        raise FormatError(f"{where} does not describe a model we can run", problems=unique)
    return config


def _switch(switch: Switch, fields: Fields, key: str) -> bool:
    return switch == "always" or (switch == "config" and fields.flag(key, default=False))


def _softcap(fields: Fields, family: Family, key: str) -> float | None:
    return fields.optional_number(key) if family.softcaps else None


def _windows(fields: Fields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    if family.windows == "never":
        return (None,) * num_layers
    window = None
    if "sliding_window" in fields:
        window = fields.integer("sliding_window", 1, MAX_POSITIONS)
    if family.windows == "all":
        return (window,) * num_layers
    if family.windows == "upper" and not fields.flag("use_sliding_window", default=False):
        return (None,) * num_layers
    if window is None:
        fields.fault("sliding_window", "a window")
    kinds = fields.texts("layer_types", num_layers)
    if kinds is None and family.windows == "upper":
        first = fields.integer("max_window_layers", 0, MAX_LAYERS)
        kinds = [LAYER_TYPES[layer >= first] for layer in range(num_layers)]
    elif kinds is None:
        every = fields.integer("sliding_window_pattern", 1, MAX_LAYERS, default=6)
        kinds = [LAYER_TYPES[bool((layer + 1) % every)] for layer in range(num_layers)]
    if unknown := sorted(set(kinds) - set(LAYER_TYPES)):
        fields.problems.append(f"layer_types: {' or '.join(LAYER_TYPES)} expected, found {unknown}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _refuse_unsupported(fields: Fields) -> None:
    if fields.flag("use_bidirectional_attention", default=False):
        fields.fault("use_bidirectional_attention", "false (attention here is causal)")
    quantization = fields.nested("quantization_config")
    if quantization is None:
        return
    method = quantization.text("quant_method")
    four_bit = quantization.flag("load_in_4bit", default=method == "halfbyte")
    if method not in ("bitsandbytes", "halfbyte") or not four_bit:
        fields.fault("quantization_config", "4 bits by bitsandbytes or halfbyte")


def _notes(values: Mapping[str, object]) -> tuple[str, ...]:
    if "auto_map" not in values:
        return ()
    return ("config.json names code of its own (`auto_map`): ignored, never run",)

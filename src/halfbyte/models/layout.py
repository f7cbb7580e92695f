"""Which tensors a model has: their names, shapes and layers, from its config.

The names are those of Hugging Face checkpoints of every family we run.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from halfbyte.layers.weights import WeightRef
from halfbyte.models.config import ModelConfig

EMBEDDINGS = "model.embed_tokens.weight"
LAST_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class LinearRefs:
    """A linear: its module path, weight and bias."""

    path: str
    weight: WeightRef
    bias: WeightRef | None


@dataclass(frozen=True, slots=True)
class LayerRefs:
    """Handles of one decoder layer; None where the family has no such part."""

    query: LinearRefs
    key: LinearRefs
    value: LinearRefs
    output: LinearRefs
    gate: LinearRefs
    up: LinearRefs
    down: LinearRefs
    attention_norm: WeightRef
    mlp_norm: WeightRef
    query_norm: WeightRef | None
    key_norm: WeightRef | None
    post_attention_norm: WeightRef | None
    post_mlp_norm: WeightRef | None

    @property
    def linears(self) -> tuple[LinearRefs, ...]:
        """In the order in which they are used."""
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)

    def refs(self) -> Iterator[WeightRef]:
        """Every handle."""
        for linear in self.linears:
            yield linear.weight
            if linear.bias is not None:
                yield linear.bias
        norms = (
            self.attention_norm,
            self.mlp_norm,
            self.query_norm,
            self.key_norm,
            self.post_attention_norm,
            self.post_mlp_norm,
        )
        yield from (norm for norm in norms if norm is not None)


@dataclass(frozen=True, slots=True)
class Layout:
    """Handles of a whole model.

    Attributes:
        embeddings: `[vocabulary, hidden]`.
        layers: In order.
        last_norm: `[hidden]`.
        head: `[vocabulary, hidden]`; the embeddings when tied.
    """

    embeddings: WeightRef
    layers: tuple[LayerRefs, ...]
    last_norm: WeightRef
    head: WeightRef

    def refs(self) -> Iterator[WeightRef]:
        """Every handle, once."""
        yield self.embeddings
        for layer in self.layers:
            yield from layer.refs()
        yield self.last_norm
        if self.head != self.embeddings:
            yield self.head

    def linear_paths(self) -> list[str]:
        """Module paths of the linears inside decoder layers: what adapters and 4 bits apply to."""
        return [linear.path for layer in self.layers for linear in layer.linears]


def layout_of(config: ModelConfig) -> Layout:
    """The tensors that a checkpoint of this config holds."""
    hidden = config.hidden_size
    embeddings = WeightRef(EMBEDDINGS, (config.vocabulary_size, hidden))
    return Layout(
        embeddings,
        tuple(_layer(config, index) for index in range(config.num_layers)),
        WeightRef(LAST_NORM, (hidden,)),
        embeddings if config.tied else WeightRef(HEAD, (config.vocabulary_size, hidden)),
    )


def _layer(config: ModelConfig, index: int) -> LayerRefs:
    root = f"model.layers.{index}."
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    family = config.family

    def linear(path: str, outputs: int, inputs: int, *, bias: bool) -> LinearRefs:
        return LinearRefs(
            root + path,
            WeightRef(f"{root}{path}.weight", (outputs, inputs), index),
            WeightRef(f"{root}{path}.bias", (outputs,), index) if bias else None,
        )

    def norm(path: str, size: int) -> WeightRef:
        return WeightRef(f"{root}{path}.weight", (size,), index)

    # Families with norms on both sides call the one before the feed-forward layers otherwise.
    mlp_norm = "pre_feedforward_layernorm" if family.post_norms else "post_attention_layernorm"
    return LayerRefs(
        query=linear("self_attn.q_proj", queries, hidden, bias=config.qkv_bias),
        key=linear("self_attn.k_proj", keys, hidden, bias=config.qkv_bias),
        value=linear("self_attn.v_proj", keys, hidden, bias=config.qkv_bias),
        output=linear("self_attn.o_proj", hidden, queries, bias=config.output_bias),
        gate=linear("mlp.gate_proj", inner, hidden, bias=config.mlp_bias),
        up=linear("mlp.up_proj", inner, hidden, bias=config.mlp_bias),
        down=linear("mlp.down_proj", hidden, inner, bias=config.mlp_bias),
        attention_norm=norm("input_layernorm", hidden),
        mlp_norm=norm(mlp_norm, hidden),
        query_norm=norm("self_attn.q_norm", config.head_dim) if family.qk_norm else None,
        key_norm=norm("self_attn.k_norm", config.head_dim) if family.qk_norm else None,
        post_attention_norm=norm("post_attention_layernorm", hidden) if family.post_norms else None,
        post_mlp_norm=norm("post_feedforward_layernorm", hidden) if family.post_norms else None,
    )

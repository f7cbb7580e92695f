"""The model families we run, each a record: what differs between them, and nothing else.

Adding one is adding a record and a parity test; `docs/models.md` shows how.
"""

from dataclasses import dataclass
from typing import Literal

from halfbyte.errors import UnsupportedError

Switch = Literal["never", "always", "config"]
"""Whether a part exists; `config` means that a flag of `config.json` decides."""

Windows = Literal["never", "all", "upper", "pattern"]
"""Which layers have a sliding window.

never: none. all: every one, when `sliding_window` is set. upper: those from `max_window_layers` on,
when `use_sliding_window` is set. pattern: all but every `sliding_window_pattern`-th. An explicit
`layer_types` wins over the last two.
"""


@dataclass(frozen=True, slots=True)
class Family:
    """What a `model_type` of `config.json` stands for.

    Attributes:
        name: The `model_type`.
        qkv_bias: Biases of the query, key and value projections; flag `attention_bias`.
        output_bias: Bias of the attention's output projection; flag `attention_bias`.
        mlp_bias: Biases of the feed-forward projections; flag `mlp_bias`.
        qk_norm: Queries and keys are normalized head by head.
        post_norms: Attention and feed-forward outputs are normalized before they are added.
        norm_plus_one: Files hold norm weights minus one.
        scaled_embeddings: Embeddings are multiplied with sqrt(hidden size), rounded to bfloat16's
            or whichever dtype they have.
        windows: Which layers have a sliding window.
        local_theta: Rotary base of windowed layers, when it differs from the others'.
        theta: Rotary base when the file names none.
        head_dim: When the file names none; None means hidden size / heads.
        tied: Whether the head is the embeddings, when the file does not say.
        activation_key: Where the file names the activation.
        query_scalar: Scores are scaled by `query_pre_attn_scalar`^-0.5, not by head_dim^-0.5.
        softcaps: `attn_logit_softcapping` and `final_logit_softcapping` are honoured.
    """

    name: str
    qkv_bias: Switch = "never"
    output_bias: Switch = "never"
    mlp_bias: Switch = "never"
    qk_norm: bool = False
    post_norms: bool = False
    norm_plus_one: bool = False
    scaled_embeddings: bool = False
    windows: Windows = "never"
    local_theta: float | None = None
    theta: float = 10_000.0
    head_dim: int | None = None
    tied: bool = False
    activation_key: str = "hidden_act"
    query_scalar: bool = False
    softcaps: bool = False


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", qkv_bias="config", output_bias="config", mlp_bias="config"),
        Family("mistral", windows="all"),
        Family("qwen2", qkv_bias="always", windows="upper"),
        Family(
            "qwen3",
            qkv_bias="config",
            output_bias="config",
            qk_norm=True,
            windows="upper",
            head_dim=128,
        ),
        Family(
            "gemma3_text",
            qkv_bias="config",
            output_bias="config",
            qk_norm=True,
            post_norms=True,
            norm_plus_one=True,
            scaled_embeddings=True,
            windows="pattern",
            local_theta=10_000.0,
            theta=1_000_000.0,
            head_dim=256,
            tied=True,
            activation_key="hidden_activation",
            query_scalar=True,
            softcaps=True,
        ),
    )
}
"""By `model_type`."""


def find_family(name: str) -> Family:
    """The family of that `model_type`.

    Raises:
        UnsupportedError: There is none; the message lists those there are.
    """
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedError(f"unknown model family {name!r}; known families: {known}")
    return FAMILIES[name]

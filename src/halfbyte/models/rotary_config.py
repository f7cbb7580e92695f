"""Rotary settings of `config.json`, in both spellings that exist.

Older files: `rope_theta`, `rope_scaling`, `rope_local_base_freq`. Files of transformers 5:
`rope_parameters`, flat, or an object for each of `full_attention` and `sliding_attention`.
"""

import math

from halfbyte.layers.rotary import RotarySpec
from halfbyte.models.families import Family
from halfbyte.models.fields import Fields

KINDS = ("default", "linear", "llama3", "yarn")


def parse_rotary(
    fields: Fields, family: Family, max_positions: int
) -> tuple[RotarySpec, RotarySpec | None]:
    """The rotary embedding of most layers, and of windowed ones when the family has its own."""
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        fields.fault("partial_rotary_factor", "1 (whole heads are rotated)")
    parameters = fields.nested("rope_parameters")
    if parameters is not None and "full_attention" in parameters:
        common = parameters.nested("full_attention")
        local = parameters.nested("sliding_attention")
    else:
        common, local = parameters or fields.nested("rope_scaling"), None
    theta = fields.number("rope_theta", family.theta, low=1.0)
    spec = _parse(common, fields, theta, max_positions)
    if family.local_theta is None:
        return spec, None
    local_theta = fields.number("rope_local_base_freq", family.local_theta, low=1.0)
    return spec, _parse(local, fields, local_theta, max_positions)


def _parse(
    parameters: Fields | None, fields: Fields, theta: float, max_positions: int
) -> RotarySpec:
    if parameters is None:
        return RotarySpec(theta)
    kind = parameters.text("rope_type", default=parameters.text("type", default="default"))
    if kind not in KINDS:
        known = ", ".join(KINDS)
        parameters.problems.append(f"rope_type: one of {known} expected, found {kind!r}")
    if parameters.number("partial_rotary_factor", 1.0) != 1.0:
        parameters.fault("partial_rotary_factor", "1 (whole heads are rotated)")
    theta = parameters.number("rope_theta", theta, low=1.0)
    if kind == "default":
        return RotarySpec(theta)
    factor = parameters.number("factor", low=1.0, zero=True)
    if kind == "linear":
        return RotarySpec(theta, "linear", factor)
    key = "original_max_position_embeddings"
    owner = fields if key in fields else parameters  # beside the settings, it wins
    original = owner.integer(key, 1, 2**31, default=max_positions)
    if kind == "llama3":
        low = parameters.number("low_freq_factor")
        high = parameters.number("high_freq_factor")
        if high <= low:
            parameters.fault("high_freq_factor", f"a number above low_freq_factor {low:g}")
        return RotarySpec(theta, kind, factor, original, low, high)
    return RotarySpec(
        theta,
        kind,
        factor,
        original,
        beta_fast=parameters.number("beta_fast", 32.0),
        beta_slow=parameters.number("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(parameters, factor),
        truncate=parameters.flag("truncate", default=True),
    )


def _yarn_attention_factor(parameters: Fields, factor: float) -> float:
    """What the file says, else what the method gives for `factor`."""

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    stated = parameters.optional_number("attention_factor")
    if stated is not None:
        return stated
    if "mscale" in parameters and "mscale_all_dim" in parameters:
        return magnitude(parameters.number("mscale")) / magnitude(
            parameters.number("mscale_all_dim")
        )
    return magnitude(1.0)

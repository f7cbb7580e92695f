"""Choosing layers and ranks."""

import math

import pytest
from pydantic import ValidationError

from halfbyte.adapters.spec import LoraSpec, resolve_targets
from halfbyte.errors import ConfigError

LINEARS = [
    f"model.layers.{layer}.{part}"
    for layer in range(12)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]


def test_all_linear_layers_by_default() -> None:
    shapes = resolve_targets(LoraSpec(), LINEARS)
    assert list(shapes) == LINEARS
    assert {s.rank for s in shapes.values()} == {LoraSpec().rank}


def test_endings_select_whole_name_parts() -> None:
    assert len(resolve_targets(LoraSpec(targets=["q_proj"]), LINEARS)) == 12
    with pytest.raises(ConfigError, match=r"'proj' matches no linear layer"):
        resolve_targets(LoraSpec(targets=["proj"]), LINEARS)


def test_a_regular_expression_is_for_whole_names() -> None:
    spec = LoraSpec(targets=r".*\.(q|v)_proj", exclude=r".*layers\.[01]\..*")
    assert len(resolve_targets(spec, LINEARS)) == 20


def test_patterns_end_the_name_and_the_first_wins() -> None:
    spec = LoraSpec(
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 64, "q_proj": 8}, alpha_pattern={"v_proj": 5}
    )
    shapes = resolve_targets(spec, LINEARS)
    assert shapes["model.layers.1.self_attn.q_proj"].rank == 64
    assert shapes["model.layers.11.self_attn.q_proj"].rank == 8
    assert shapes["model.layers.0.mlp.up_proj"].rank == spec.rank
    assert shapes["model.layers.0.self_attn.v_proj"].scaling == 5 / spec.rank


def test_rank_stabilised_scaling() -> None:
    shapes = resolve_targets(LoraSpec(rank=16, alpha=8, use_rslora=True), LINEARS)
    assert next(iter(shapes.values())).scaling == 8 / math.sqrt(16)


def test_every_fault_is_listed_with_the_names_there_are() -> None:
    spec = LoraSpec(
        targets=["q_proj", "k_proj"],
        exclude="(",
        rank_pattern={"o_proj": 4},
        alpha_pattern={"[": 1},
    )
    with pytest.raises(ConfigError) as caught:
        resolve_targets(spec, LINEARS)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    for part in ("'k_proj' matches no", "'('", "'o_proj' matches no", "'['", "q_proj, up_proj"):
        assert part in text


@pytest.mark.parametrize("targets", [[], ""])
def test_empty_targets_are_refused(targets: str | list[str]) -> None:
    with pytest.raises(ConfigError, match="empty"):
        resolve_targets(LoraSpec(targets=targets), LINEARS)


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left"):
        resolve_targets(LoraSpec(targets=["q_proj"], exclude=["q_proj"]), LINEARS)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}, {"alpha": 0}, {"r": 8}])
def test_the_section_is_strict(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        LoraSpec.model_validate(wrong)

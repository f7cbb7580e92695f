"""Which linear layers get an adapter, and of what rank.

Differs from PEFT in refusing what it would pass over: a target, an exclusion or a pattern that
matches no layer is an error that shows the names there are.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from halfbyte.errors import ConfigError

ALL_LINEAR = "all-linear"

Value = TypeVar("Value")

Initialization = Literal["default", "gaussian", "pissa", "loftq"]


class LoraSpec(BaseModel):
    """The `lora` section of a config."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update, R."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / R, or alpha / sqrt(R) with `use_rslora`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which an input of the adapter (not of the base) is zeroed in training."""
    targets: str | list[str] = ALL_LINEAR
    """`all-linear` (every projection of the decoder layers), a list of name endings such as
    `q_proj`, or one regular expression for whole names."""
    exclude: str | list[str] = Field(default_factory=list)
    """Taken away from `targets`: a list of name endings, or one regular expression."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Regular expression for the end of a name -> rank there; the first that matches counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Regular expression for the end of a name -> alpha there; the first that matches counts."""
    use_rslora: bool = False
    """Rank-stabilised scaling, arXiv:2312.03732."""
    init: Initialization = "default"
    """How the factors start. `default` and `gaussian`: A uniform or normal, B zero. `pissa`: as
    the principal components of the weight, which are subtracted from it again, so that the model
    starts as the base, too. `loftq`: as the largest part of what quantizing took away from the
    weights in `init_weights`, so that the model starts closer to them than the base is."""
    init_weights: str | None = None
    """The model that the base was quantized from: a directory, a GGUF file or a hub id. Needed by
    `loftq`, and by nothing else."""


@dataclass(frozen=True, slots=True)
class LoraShape:
    """What the spec says of one layer."""

    rank: int
    alpha: float
    use_rslora: bool

    @property
    def scaling(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def resolve_targets(spec: LoraSpec, linears: Iterable[str]) -> dict[str, LoraShape]:
    """The adapted layers and their ranks, in the order of `linears`.

    Args:
        spec: What to adapt.
        linears: Paths of the linear layers of the model, such as
            `model.layers.0.self_attn.q_proj`.

    Raises:
        ConfigError: A target, exclusion or pattern is not a regular expression or matches no
            layer, or nothing is left to adapt.
    """
    names = list(linears)
    problems = _pattern_problems(spec, names)
    if problems:
        raise ConfigError(
            "lora does not fit the model",
            problems=problems,
            hint=f"Its linear layers end in: {', '.join(_endings(names))}.",
        )
    targeted = [n for n in names if _selects(spec.targets, n) and not _selects(spec.exclude, n)]
    if not targeted:
        raise ConfigError("lora: nothing is left to adapt after `lora.exclude`")
    return {
        name: LoraShape(
            rank=_first_match(spec.rank_pattern, name, spec.rank),
            alpha=_first_match(spec.alpha_pattern, name, spec.alpha),
            use_rslora=spec.use_rslora,
        )
        for name in targeted
    }


def pattern_matches(pattern: str, name: str) -> bool:
    """PEFT's rule for `rank_pattern` and `alpha_pattern`: the pattern ends the dotted name."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _selects(selection: str | list[str], name: str) -> bool:
    if selection == ALL_LINEAR:
        return True
    if isinstance(selection, str):
        return re.fullmatch(selection, name) is not None
    return any(_ends_with(name, ending) for ending in selection)


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _first_match(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    return next((v for pattern, v in patterns.items() if pattern_matches(pattern, name)), default)


def _pattern_problems(spec: LoraSpec, names: list[str]) -> list[str]:
    problems = _selection_problems("targets", spec.targets, names)
    problems += _selection_problems("exclude", spec.exclude, names)
    if not spec.targets:
        problems.append("lora.targets: it is empty")
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(spec, field):
            if fault := _regex_fault(pattern):
                problems.append(f"lora.{field}: {fault}")
            elif not any(pattern_matches(pattern, name) for name in names):
                problems.append(f"lora.{field}: {pattern!r} matches no linear layer")
    return problems


def _selection_problems(field: str, selection: str | list[str], names: list[str]) -> list[str]:
    if isinstance(selection, str) and (fault := _regex_fault(selection)):
        return [f"lora.{field}: {fault}"]
    alone = [selection] if isinstance(selection, str) else [[ending] for ending in selection]
    return [
        f"lora.{field}: {part if isinstance(part, str) else part[0]!r} matches no linear layer"
        for part in alone
        if not any(_selects(part, name) for name in names)
    ]


def _regex_fault(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is not a regular expression: {error}"
    return None


def _endings(names: list[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})

"""An adapter as a value: low-rank factors for some linear layers of one base.

Dimension key: R rank, I input features, O output features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from halfbyte.adapters.spec import LoraShape
from halfbyte.errors import FormatError
from halfbyte.formats.checks import describe


@dataclass(frozen=True, slots=True, eq=False)
class LoraUpdate:
    """The update `scaling * B @ A` of one linear layer.

    Attributes:
        a_RI: float32 `[R, I]`.
        b_OR: float32 `[O, R]`.
        alpha: As configured; `scaling` follows from it.
        use_rslora: Whether alpha is divided by sqrt(R) instead of R.
    """

    a_RI: Tensor
    b_OR: Tensor
    alpha: float
    use_rslora: bool = False

    def __post_init__(self) -> None:
        a, b = self.a_RI, self.b_OR
        problems = [
            f"{name}: a float32 matrix expected, found {describe(factor)}"
            for name, factor in (("lora_A", a), ("lora_B", b))
            if factor.dim() != 2 or factor.dtype != torch.float32  # noqa: PLR2004
        ]
        if not problems and a.shape[0] != b.shape[1]:
            problems.append(f"lora_A {list(a.shape)} and lora_B {list(b.shape)}: ranks differ")
        if problems:
            raise FormatError("not a low-rank update", problems=problems)

    @classmethod
    def sum_of(cls, terms: Sequence[tuple[float, Tensor, Tensor]]) -> Self:
        """The sum of `weight * B A` as one update of scaling 1: factors side by side, ranks add up.

        Args:
            terms: Weight, B float32 `[O, R]` and A float32 `[R, I]` of each; at least one.

        Error bound:
            Each entry of B is rounded to float32 once, after its multiplication: relative to the
            sum of the terms' norms, the error is at most 2^-24.
        """
        b_OK = torch.cat([(b_OR.double() * weight).float() for weight, b_OR, _ in terms], dim=1)
        a_KI = torch.cat([a_RI for _, _, a_RI in terms])
        return cls(a_KI, b_OK, alpha=float(len(a_KI)))

    @property
    def rank(self) -> int:
        """R."""
        return self.a_RI.shape[0]

    @property
    def scaling(self) -> float:
        """What the product B A is multiplied by."""
        return LoraShape(self.rank, self.alpha, self.use_rslora).scaling


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Low-rank updates by module path, with what their files say beside them.

    Attributes:
        modules: Path of a linear layer, such as `model.layers.0.self_attn.q_proj`, -> update.
        base_model: Where the base was when the adapter was made: a path or hub id.
        dropout: Used in training; kept because the files keep it.
        provenance: What `provenance.json` holds; None where there is none.
    """

    modules: Mapping[str, LoraUpdate]
    base_model: str = ""
    dropout: float = 0.0
    provenance: Mapping[str, object] | None = field(default=None)

    @property
    def num_parameters(self) -> int:
        """Elements of all A and B."""
        return sum(f.a_RI.numel() + f.b_OR.numel() for f in self.modules.values())


def check_adapter_fits(
    adapter: Adapter, linears: Mapping[str, tuple[int, int]], *, name: str
) -> None:
    """Raise one error that lists every mismatch, so the user fixes them in one go.

    Args:
        adapter: What is to be attached.
        linears: Path of each linear layer of the base -> (output, input features).
        name: What to call the adapter in the error: its path.

    Raises:
        FormatError: A layer does not exist in the base, or its shapes differ.
    """
    problems = []
    for path, factors in adapter.modules.items():
        if path not in linears:
            problems.append(f"{path}: the base model has no such linear layer")
            continue
        num_outputs, num_inputs = linears[path]
        for label, found, needed in (
            ("lora_A", list(factors.a_RI.shape), [factors.rank, num_inputs]),
            ("lora_B", list(factors.b_OR.shape), [num_outputs, factors.rank]),
        ):
            if found != needed:
                problems.append(f"{path}.{label}: shape {found}, base model needs {needed}")
    if not adapter.modules:
        problems.append("it has no layers")
    if problems:
        raise FormatError(
            f"adapter {name} does not fit the base model",
            problems=problems,
            hint="Check `base_model_name_or_path` in its adapter_config.json.",
        )

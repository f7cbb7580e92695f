"""Random adapters, and what they compute in float64."""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.adapters.adapter import Adapter, LoraUpdate

FEATURES = {"layers.0.q_proj": (24, 16), "layers.0.up": (40, 16), "layers.1.q_proj": (24, 16)}


def random_update(
    seed: int, features: tuple[int, int], rank: int, alpha: float, *, use_rslora: bool = False
) -> LoraUpdate:
    generator = torch.Generator().manual_seed(seed)
    num_outputs, num_inputs = features
    a_RI = torch.randn(rank, num_inputs, generator=generator) / num_inputs**0.5
    b_OR = torch.randn(num_outputs, rank, generator=generator)
    return LoraUpdate(a_RI, b_OR, alpha, use_rslora)


def random_adapter(
    seed: int,
    rank: int = 4,
    alpha: float = 8.0,
    *,
    features: Mapping[str, tuple[int, int]] = FEATURES,
    use_rslora: bool = False,
    provenance: Mapping[str, object] | None = None,
) -> Adapter:
    modules = {
        path: random_update(97 * seed + place, shape, rank, alpha, use_rslora=use_rslora)
        for place, (path, shape) in enumerate(features.items())
    }
    return Adapter(modules, base_model="models/base", provenance=provenance)


def delta64(adapter: Adapter, path: str, features: tuple[int, int]) -> Tensor:
    """`scaling * B A` in float64; zeros where the adapter has no such layer."""
    update = adapter.modules.get(path)
    if update is None:
        return torch.zeros(features, dtype=torch.float64)
    return update.scaling * (update.b_OR.double() @ update.a_RI.double())


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()

"""Random adapters for tiny models."""

from pathlib import Path

import torch

from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.peft_files import write_adapter
from halfbyte.models.config import read_config
from halfbyte.models.layout import layout_of


def random_adapter(
    directory: Path, *, rank: int = 4, scale: float = 0.05, fingerprint: str | None = None
) -> Adapter:
    """For every linear layer of the model in `directory` but the key projections.

    Args:
        directory: The base.
        rank: Of the feed-forward layers; others have twice as much.
        scale: Standard deviation of the factors' entries, about.
        fingerprint: Of the base, for the provenance.
    """
    generator = torch.Generator().manual_seed(7)
    modules = {}
    for layer in layout_of(read_config(directory)).layers:
        for linear in layer.linears:
            if linear.path.endswith("k_proj"):
                continue
            size = rank if ".mlp." in linear.path else 2 * rank
            outputs, inputs = linear.weight.shape
            modules[linear.path] = LoraUpdate(
                torch.randn(size, inputs, generator=generator) * scale**0.5,
                torch.randn(outputs, size, generator=generator) * scale**0.5,
                alpha=1.5 * size,
            )
    provenance = None if fingerprint is None else {"base": {"fingerprint": fingerprint}}
    return Adapter(modules, str(directory), provenance=provenance)


def save_random_adapter(directory: Path, base: Path, **settings: float) -> Path:
    """The same as an adapter directory."""
    write_adapter(random_adapter(base, **settings), directory)  # type: ignore[arg-type]
    return directory

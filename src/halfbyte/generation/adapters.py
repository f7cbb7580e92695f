"""Putting adapters from files into the banks of a decoder, to generate with them."""

from collections.abc import Sequence
from pathlib import Path

from halfbyte.adapters.adapter import check_adapter_fits
from halfbyte.adapters.peft_files import read_adapter
from halfbyte.errors import UsageError
from halfbyte.layers.lora import LoraFactors
from halfbyte.models.decoder import Decoder


def attach_adapters(decoder: Decoder, directories: Sequence[str | Path]) -> None:
    """Attach adapters and use all of them together, each with weight 1.

    The bank knows an adapter by its path as given. `decoder.mixes` can be set afterwards to use
    them otherwise, for each prompt.

    Args:
        decoder: The base.
        directories: Adapters in PEFT's layout.

    Raises:
        UsageError: An adapter is named twice.
        HalfbyteError: Files are missing or not valid; see `read_adapter`.
        FormatError: An adapter does not fit the base; all misfits are listed.
    """
    names = [str(directory) for directory in directories]
    if len(set(names)) < len(names):
        raise UsageError(f"adapters: each once expected, found {', '.join(names)}")
    shapes = {
        path: (linear.out_features, linear.in_features) for path, linear in decoder.linears.items()
    }
    for name in names:
        adapter = read_adapter(name)
        check_adapter_fits(adapter, shapes, name=name)
        for path, update in adapter.modules.items():
            factors = LoraFactors(update.a_RI, update.b_OR, update.scaling, adapter.dropout)
            decoder.linears[path].attach(name, factors)
    decoder.mixes = (tuple((name, 1.0) for name in names),)

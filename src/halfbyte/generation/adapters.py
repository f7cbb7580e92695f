"""Putting adapters from files into the banks of a decoder, to generate with them."""

from collections.abc import Sequence
from pathlib import Path

from halfbyte.adapters.adapter import Adapter, check_adapter_fits
from halfbyte.adapters.peft_files import read_adapter
from halfbyte.errors import UsageError, VerificationError
from halfbyte.layers.lora import LoraFactors
from halfbyte.models.decoder import Decoder


def attach_adapters(
    decoder: Decoder, directories: Sequence[str | Path], *, base: str | None = None
) -> None:
    """Attach adapters and use all of them together, each with weight 1.

    The bank knows an adapter by its path as given. `decoder.mixes` can be set afterwards to use
    them otherwise, for each prompt.

    Args:
        decoder: The base.
        directories: Adapters in PEFT's layout.
        base: Fingerprint of the base, if it is known. An adapter whose provenance names another
            one is refused; one without provenance cannot be checked so.

    Raises:
        UsageError: An adapter is named twice.
        HalfbyteError: Files are missing or not valid; see `read_adapter`.
        FormatError: An adapter does not fit the base; all misfits are listed.
        VerificationError: An adapter was trained on another base.
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
        _require_same_base(adapter, base, name)
        for path, update in adapter.modules.items():
            factors = LoraFactors(update.a_RI, update.b_OR, update.scaling, adapter.dropout)
            decoder.linears[path].attach(name, factors)
    decoder.mixes = (tuple((name, 1.0) for name in names),)


def _require_same_base(adapter: Adapter, base: str | None, name: str) -> None:
    record = (adapter.provenance or {}).get("base")
    trained_on = record.get("fingerprint") if isinstance(record, dict) else None
    if base is None or trained_on is None or trained_on == base:
        return
    raise VerificationError(
        f"adapter {name} was trained on another base: fingerprint {trained_on} expected, "
        f"found {base}",
        hint=f"Its base was {adapter.base_model or 'not named'}; quantizing again with other "
        "settings makes another base, too.",
    )

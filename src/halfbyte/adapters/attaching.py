"""Putting an adapter into the banks of a decoder, once it is known to belong there."""

from pathlib import Path

from halfbyte.adapters.adapter import Adapter, check_adapter_fits
from halfbyte.adapters.stack import base_fingerprint
from halfbyte.errors import VerificationError
from halfbyte.layers.lora import LoraFactors
from halfbyte.models.decoder import Decoder


def attach_adapter(
    decoder: Decoder, name: str, adapter: Adapter, *, base: str | None, source: str | Path
) -> None:
    """Attach an adapter under a name, without gradients and without using it yet.

    Args:
        decoder: The base.
        name: In the banks.
        adapter: Its factors; not copied.
        base: Fingerprint of the base, if it is known. An adapter whose provenance names another
            one is refused; one without provenance cannot be checked so.
        source: Where it comes from, for messages.

    Raises:
        FormatError: The adapter does not fit the base; all misfits are listed.
        VerificationError: It was trained on another base.
    """
    shapes = {
        path: (linear.out_features, linear.in_features) for path, linear in decoder.linears.items()
    }
    check_adapter_fits(adapter, shapes, name=str(source))
    _require_same_base(adapter, base, source)
    for path, update in adapter.modules.items():
        factors = LoraFactors(update.a_RI, update.b_OR, update.scaling, adapter.dropout)
        decoder.linears[path].attach(name, factors)


def _require_same_base(adapter: Adapter, base: str | None, source: str | Path) -> None:
    trained_on = base_fingerprint(adapter)
    if base is None or trained_on is None or trained_on == base:
        return
    raise VerificationError(
        f"adapter {source} was trained on another base: fingerprint {trained_on} expected, "
        f"found {base}",
        hint=f"Its base was {adapter.base_model or 'not named'}; quantizing again with other "
        "settings makes another base, too.",
    )

"""Adapters of a loaded model: from files into the banks of a decoder, and which are used."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from halfbyte.adapters.attaching import attach_adapter
from halfbyte.adapters.stack import trained_on_top_of
from halfbyte.adapters.stack_files import load_adapter
from halfbyte.errors import UsageError, VerificationError
from halfbyte.layers.lora import Mix
from halfbyte.models.decoder import Decoder

AdapterChoice = str | Mapping[str, float] | None
"""What a prompt uses: one adapter, several with their weights, or None for the base alone."""


def name_adapters(adapters: Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, Path]:
    """Adapters by name; those that come without one are called by their path as given.

    Raises:
        UsageError: An adapter is named twice, or a name is empty.
    """
    if isinstance(adapters, Mapping):
        named = {name: Path(path) for name, path in adapters.items()}
    else:
        named = {str(path): Path(path) for path in adapters}
    if len(named) < len(adapters) or "" in named:
        found = ", ".join(map(str, adapters))
        raise UsageError(f"adapters: each once and with a name expected, found {found}")
    return named


def attach_adapters(
    decoder: Decoder, adapters: Mapping[str, Path], *, base: str | None = None
) -> None:
    """Attach adapters and use all of them together, each with weight 1.

    Args:
        decoder: The base.
        adapters: Name in the banks -> directory of an adapter or a stack.
        base: Fingerprint of the base, if it is known. An adapter whose provenance names another
            one is refused; one without provenance cannot be checked so.

    Raises:
        HalfbyteError: Files are missing or not valid; see `load_adapter`.
        FormatError: An adapter does not fit the base; all misfits are listed.
        VerificationError: An adapter was trained on another base, or on top of another adapter.
    """
    for name, directory in adapters.items():
        adapter = load_adapter(directory)
        if below := trained_on_top_of(adapter):
            raise VerificationError(
                f"adapter {directory} was trained on top of "
                f"{' > '.join(part.name for part in below)}, and means nothing without",
                hint="Load the stack that it is a part of; `halfbyte stack build` makes one.",
            )
        attach_adapter(decoder, name, adapter, base=base, source=directory)
    decoder.mixes = (tuple((name, 1.0) for name in adapters),)


def mix_of(choice: AdapterChoice, names: Collection[str]) -> Mix:
    """The mix that a choice means; weights of zero are left out.

    Args:
        choice: What is to be used.
        names: Adapters there are.

    Raises:
        UsageError: An adapter is not loaded, or a weight is not a number; lists everything.
    """
    if choice is None:
        return ()
    weights = {choice: 1.0} if isinstance(choice, str) else choice
    known = ", ".join(names) or "none"
    problems = [
        f"{name!r}: no adapter of this name is loaded; there are: {known}"
        for name in weights
        if name not in names
    ]
    problems += [
        f"{name!r}: a finite weight expected, found {weight!r}"
        for name, weight in weights.items()
        if not isinstance(weight, int | float) or not math.isfinite(weight)
    ]
    if problems:
        raise UsageError("adapters cannot be mixed so", problems=problems)
    return tuple((name, float(weight)) for name, weight in weights.items() if weight)


def mixes_of(
    choices: Sequence[AdapterChoice], names: Collection[str], num_prompts: int
) -> list[Mix]:
    """The mix of each prompt.

    Raises:
        UsageError: There is not one choice a prompt; see also `mix_of`.
    """
    if isinstance(choices, str | Mapping) or len(choices) != num_prompts:
        found = repr(choices) if isinstance(choices, str | Mapping) else len(choices)
        raise UsageError(
            f"adapters: a list of {num_prompts}, one a prompt, expected, found {found}"
        )
    return [mix_of(choice, names) for choice in choices]

"""What a merge starts from: a base, an adapter that belongs to it, and weights to add it to.

Everything is opened and compared here, so that a merge that cannot be right fails before it
writes anything.
"""

from dataclasses import dataclass
from pathlib import Path

from halfbyte.adapters.adapter import Adapter, check_adapter_fits
from halfbyte.adapters.fingerprint import fingerprint_adapter
from halfbyte.adapters.stack import base_fingerprint, trained_on_top_of
from halfbyte.adapters.stack_files import load_adapter
from halfbyte.errors import FormatError, VerificationError
from halfbyte.formats.checks import nonfinite_fault
from halfbyte.formats.shards import open_shards
from halfbyte.models.base_source import BaseTensors, measure_fingerprint, open_base
from halfbyte.models.config import parse_config
from halfbyte.models.layout import layout_of
from halfbyte.models.record import recorded_fingerprint
from halfbyte.models.sources import Source, Tensors, open_source


@dataclass(frozen=True, slots=True, eq=False)
class MergeInputs:
    """A base, an adapter that fits it, and the weights that take the update.

    Attributes:
        base: Directory of the base.
        source: The base, its 4-bit weights decoded.
        base_tensors: The tensors of `source`.
        fingerprint: Of the base's tensors, measured.
        adapter: What is merged.
        adapter_name: Path of the adapter, or what to call one without files.
        original: The 16-bit model that the update is added to instead of the base, or None.
    """

    base: Path
    source: Source
    base_tensors: BaseTensors
    fingerprint: str
    adapter: Adapter
    adapter_name: str
    original: Source | None

    @property
    def weights(self) -> Tensors:
        """What the update is added to."""
        return self.base_tensors if self.original is None else self.original.tensors

    def record(self) -> dict[str, object]:
        """Where the merge comes from, for `halfbyte.json`; enough to find the base again."""
        return {
            "base": {"path": str(self.base.resolve()), "fingerprint": self.fingerprint},
            "adapter": {
                "path": self.adapter_name,
                "fingerprint": fingerprint_adapter(self.adapter),
            },
            "weights": None if self.original is None else dict(self.original.description),
        }


def open_merge(
    model: str | Path, adapter: str | Path | Adapter, *, base_weights: str | Path | None = None
) -> MergeInputs:
    """Open a base and an adapter, and check that they belong together.

    Args:
        model: Directory of the base that the adapter was trained on.
        adapter: Directory of an adapter in PEFT's layout or of a stack, or the adapter itself.
        base_weights: The 16-bit model that the base was quantized from: a directory, a GGUF file
            or a hub id. The update is then added to these weights.

    Raises:
        HalfbyteError: Files are missing, unsafe or not valid; see `open_base`,
            `load_adapter` and `open_source`.
        VerificationError: The base is not the one that its record or the adapter names; other
            misfits are listed too.
        FormatError: The adapter does not fit the base, or holds a NaN; all faults are listed.
    """
    base = Path(model)
    source, tensors = open_base(base)
    if isinstance(adapter, Adapter):
        value, name = adapter, "in memory"
    else:
        value, name = load_adapter(adapter), str(adapter)
    fingerprint = measure_fingerprint(open_shards(base))
    _check(value, name, source, base, fingerprint)
    original = None if base_weights is None else open_source(base_weights)
    if original is not None:
        _check_original(original, tensors)
    return MergeInputs(base, source, tensors, fingerprint, value, name, original)


def _check(adapter: Adapter, name: str, source: Source, base: Path, fingerprint: str) -> None:
    layout = layout_of(parse_config(source.config, source.generation_config))
    linears = {
        linear.path: (linear.weight.shape[0], linear.weight.shape[1])
        for layer in layout.layers
        for linear in layer.linears
    }
    problems = []
    recorded = recorded_fingerprint(base)
    if recorded not in (None, fingerprint):
        problems.append(f"{base}: fingerprint {recorded} recorded, its tensors have {fingerprint}")
    trained_on = base_fingerprint(adapter)
    if trained_on not in (None, fingerprint):
        problems.append(f"fingerprint {trained_on} expected of the base, found {fingerprint}")
    if below := trained_on_top_of(adapter):
        problems.append(
            f"it was trained on top of {' > '.join(part.name for part in below)}: merge the stack"
        )
    wrong_base = bool(problems)
    try:
        check_adapter_fits(adapter, linears, name=name)
    except FormatError as error:
        problems += error.problems
    problems += [
        nonfinite_fault(factor, f"{path}.{label}")
        for path, update in adapter.modules.items()
        for label, factor in (("lora_A", update.a_RI), ("lora_B", update.b_OR))
        if not factor.isfinite().all()
    ]
    if problems:
        kind = VerificationError if wrong_base else FormatError
        raise kind(
            f"adapter {name} cannot be merged into {base}",
            problems=problems,
            hint=f"Its base was {adapter.base_model or 'not named'}; quantizing again with other "
            "settings makes another base, too.",
        )


def _check_original(original: Source, base: BaseTensors) -> None:
    found = original.tensors.shapes
    problems = [
        f"{name}: shape {list(shape)} expected, found "
        + ("none" if name not in found else str(list(found[name])))
        for name, shape in base.shapes.items()
        if found.get(name) != shape
    ]
    if problems:
        raise FormatError(
            f"{original.description['name']} is not the model that the base was made from",
            problems=problems[:20],
            num_problems=len(problems),
        )

"""`hb.compose`: adapters and an expression in, one adapter directory out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import halfbyte
from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.peft_files import write_adapter
from halfbyte.composition.evaluate import evaluate_layer
from halfbyte.composition.expression import Name, Node, Sum, Svd, to_text, weights_of
from halfbyte.composition.factored import Factored, from_update
from halfbyte.composition.parser import parse
from halfbyte.composition.parts import Part, features_of, read_parts, require_compatible
from halfbyte.composition.report import EnergyReport, LayerEnergy
from halfbyte.composition.search import FoundWeights, Told, find_weights
from halfbyte.errors import FormatError, UsageError
from halfbyte.storage.atomic import require_absent

REPORT_FILE = "compose_report.json"
PROVENANCE_VERSION = 1

Progress = Callable[[int, int], None]
"""Told after each layer: how many are done, and of how many."""


@dataclass(frozen=True, slots=True, eq=False)
class Composition:
    """A composed adapter as it was written.

    Attributes:
        path: Its directory.
        expression: What it is.
        adapter: Its factors.
        parts: The adapters it was made of, by name.
        report: What was kept and dropped.
        found: How the weights were found; None when an expression gave them.
        notes: What could not be verified, and what a user should know, a sentence each.
    """

    path: Path
    expression: str
    adapter: Adapter
    parts: Mapping[str, Part]
    report: EnergyReport
    found: FoundWeights | None
    notes: tuple[str, ...]


def compose(
    expression: str | None = None,
    *,
    adapters: Mapping[str, str | Path],
    out: str | Path,
    rank: int | None = None,
    fidelity: float | None = None,
    search: str | Path | None = None,
    model: str | Path | None = None,
    replace: bool = False,
    progress: Progress | None = None,
    told: Told | None = None,
) -> Composition:
    """Combine adapters into one, exactly unless the expression or a limit says otherwise.

    Args:
        expression: Such as `0.7*sql + 0.3*tone`, `a > b`, `svd(ties(a, b, density=0.5), rank=16)`.
            Without one, the weights of a sum of all adapters are searched.
        adapters: Name in the expression -> directory in PEFT's layout.
        out: The adapter directory to write.
        rank: Compress the result to at most this rank: `svd(expression, rank=...)`.
        fidelity: Compress every layer to the smallest rank that keeps this part of its energy.
        search: Instead of an expression, 16 to 64 examples to find weights on; see `find_weights`.
        model: The base, for a search.
        replace: Whether `out` may be replaced.
        progress: Told after each layer.
        told: Told of every step of a search.

    Raises:
        UsageError: The expression cannot be used; every fault is shown at its place. Or there are
            no adapters, or not one of an expression and a search.
        HalfbyteError: Adapters cannot be read.
        VerificationError: They were trained on different bases, or in another order.
        FormatError: Their shapes differ, or the result is not finite or nothing at all.
        StorageError: `out` exists, or writing failed.
    """
    if not adapters:
        raise UsageError("adapters: at least one expected, found none")
    if (expression is None) == (search is None) or (search is None) != (model is None):
        raise UsageError("compose: an expression, or search and model together, expected")
    text = " + ".join(adapters) if expression is None else expression
    node = _limited(parse(text, adapters.keys()), rank, fidelity)
    weights = weights_of(node)
    used = {name: directory for name, directory in adapters.items() if name in weights}
    _require_writable(Path(out), used, replace=replace)
    parts = read_parts(used)
    notes = list(require_compatible(parts, node))
    if unused := [name for name in adapters if name not in weights]:
        notes.append(f"the expression does not name {', '.join(unused)}")
    found = None
    if search is not None and model is not None:
        found = find_weights(model, {n: Path(p) for n, p in adapters.items()}, search, told=told)
        notes += found.notes
        terms = tuple((w, Name(name)) for name, w in found.chosen.weights.items() if w)
        node = _limited(Sum(terms), rank, fidelity)
        weights = weights_of(node)
        parts = {name: part for name, part in parts.items() if name in weights}
    modules, report = _evaluate(node, parts, progress)
    provenance = _provenance(node, parts, weights, found)
    adapter = Adapter(modules, _base_model(parts, notes), provenance=provenance)
    write_adapter(adapter, out, beside={REPORT_FILE: report.to_json()}, replace=replace)
    return Composition(Path(out), to_text(node), adapter, parts, report, found, tuple(notes))


def _limited(node: Node, rank: int | None, fidelity: float | None) -> Node:
    if rank is None and fidelity is None:
        return node
    problems = []
    if rank is not None and fidelity is not None:
        problems.append("rank and fidelity: one of them expected, found both")
    if rank is not None and rank < 1:
        problems.append(f"rank: at least 1 expected, found {rank}")
    if fidelity is not None and not 0 < fidelity <= 1:
        problems.append(f"fidelity: above 0 and at most 1 expected, found {fidelity}")
    if problems:
        raise UsageError("cannot compress so", problems=problems)
    return Svd(node, rank, fidelity)


def _require_writable(out: Path, used: Mapping[str, str | Path], *, replace: bool) -> None:
    owners = [
        name for name, directory in used.items() if Path(directory).resolve() == out.resolve()
    ]
    if owners:
        raise UsageError(
            f"{out}: the result cannot take the place of its own part {', '.join(owners)}",
            hint="Its provenance would name what is no longer there. Write elsewhere.",
        )
    if not replace:
        require_absent(out)


def _evaluate(
    node: Node, parts: Mapping[str, Part], progress: Progress | None
) -> tuple[dict[str, LoraUpdate], EnergyReport]:
    modules: dict[str, LoraUpdate] = {}
    layers: list[LayerEnergy] = []
    problems = []
    paths = list(features_of(parts))
    for done, path in enumerate(paths, 1):
        value = evaluate_layer(node, _updates_at(path, parts), path)
        if value.update.terms:
            update = value.update.to_update()
            energy = from_update(update).energy()
            if not (update.a_RI.isfinite().all() and update.b_OR.isfinite().all()):
                problems.append(f"{path}: values beyond float32")
            modules[path] = update
            layers.append(LayerEnergy(path, update.rank, energy, value.cuts))
        if progress is not None:
            progress(done, len(paths))
    if not modules:
        problems.append("nothing is left: all weights are zero or cancel")
    if problems:
        raise FormatError(f"{to_text(node)} is no adapter", problems=problems)
    return modules, EnergyReport(tuple(layers))


def _updates_at(path: str, parts: Mapping[str, Part]) -> dict[str, Factored]:
    return {
        name: from_update(part.adapter.modules[path])
        for name, part in parts.items()
        if path in part.adapter.modules
    }


def _base_model(parts: Mapping[str, Part], notes: list[str]) -> str:
    """Where the base is, by the first part; parts may know it by different paths."""
    bases = list(dict.fromkeys(part.adapter.base_model for part in parts.values()))
    if len(bases) > 1:
        notes.append(f"the parts name their base differently: {', '.join(map(repr, bases))}")
    return next((base for base in bases if base), "")


def _provenance(
    node: Node,
    parts: Mapping[str, Part],
    weights: Mapping[str, float],
    found: FoundWeights | None,
) -> dict[str, object]:
    base = next((part.base for part in parts.values() if part.base_fingerprint), {})
    return {
        "version": PROVENANCE_VERSION,
        "halfbyte": halfbyte.__version__,
        "base": dict(base),
        "composition": {
            "expression": to_text(node),
            "search": None if found is None else found.to_json(),
            "parts": {
                name: {
                    "path": str(part.directory.absolute()),
                    "fingerprint": part.fingerprint,
                    "weight": weights[name],
                }
                for name, part in parts.items()
            },
        },
    }

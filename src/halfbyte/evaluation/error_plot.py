"""A picture of quantization error: per layer by kind of module, and where the error sits."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from halfbyte.errors import UsageError
from halfbyte.formats.error_report import ErrorReport, ModelErrorReport, combine_reports

FORMATS = (".png", ".svg", ".pdf")

COLOURS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#222222",
    "#994f00",
    "#88aa99",
    "#9988cc",
)
"""Told apart by most colour-blind readers too. Source: Paul Tol's "bright" scheme, extended."""

MARKERS = "osD^vP*Xhd"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands in its model.

    Attributes:
        layer: Number of its layer, or None outside of the layers.
        kind: The rest of its name, other numbers (of experts) as `*`: `self_attn.q_proj`.
    """

    layer: int | None
    kind: str


def find_place(name: str) -> Place:
    """Read a tensor's place off its name.

    The first number between dots is the layer. So `model.layers.3.mlp.experts.7.up_proj.weight`
    is `mlp.experts.*.up_proj` in layer 3.
    """
    stem = name.removesuffix(".weight")
    match = re.search(r"(?:^|\.)(\d+)\.", stem)
    if match is None:
        return Place(None, stem)
    return Place(int(match[1]), re.sub(r"(?<=\.)\d+(?=\.|$)", "*", stem[match.end() :]))


def group_by_place(reports: Sequence[ErrorReport]) -> dict[str, dict[int | None, ErrorReport]]:
    """Kind -> layer -> all tensors of that place together, both in the order of the model."""
    found: dict[str, dict[int | None, list[ErrorReport]]] = {}
    for report in reports:
        place = find_place(report.name)
        found.setdefault(place.kind, {}).setdefault(place.layer, []).append(report)
    return {
        kind: {layer: combine_reports(parts, name=kind) for layer, parts in layers.items()}
        for kind, layers in found.items()
    }


def plot_errors(report: ModelErrorReport, path: Path, *, title: str) -> None:
    """Draw a report.

    Left, where the model has layers: relative RMS error of each layer, a line a kind of module.
    Right: how the squared error of the whole model divides among the kinds.

    Args:
        report: Of at least one tensor.
        path: The file to write; its suffix says the format: .png, .svg or .pdf.
        title: What was quantized, and to what.

    Raises:
        UsageError: Another suffix, or a report of nothing.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: a name that ends in {', '.join(FORMATS)} expected")
    if not report.tensors:
        raise UsageError("nothing to draw: the report has no tensors")
    kinds = group_by_place(report.tensors)
    styles = {
        kind: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, kind in enumerate(kinds)
    }
    layered = any(layer is not None for layers in kinds.values() for layer in layers)
    figure = Figure(figsize=(11 if layered else 6.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    if layered:
        left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
        _draw_layers(left, kinds, styles)
    else:
        right = figure.subplots()
    _draw_shares(right, kinds, styles)
    total = report.total
    figure.suptitle(
        f"{title}\n{total.num_elements:,} parameters, {total.bits_per_element:.3f} bits each, "
        f"relative RMS error {total.relative_rms_error:.2%}, SNR {total.snr_db:.2f} dB",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def _draw_layers(
    axes: Axes,
    kinds: dict[str, dict[int | None, ErrorReport]],
    styles: dict[str, tuple[str, str]],
) -> None:
    for kind, layers in kinds.items():
        points = sorted((n, r.relative_rms_error) for n, r in layers.items() if n is not None)
        if not points:
            continue
        colour, marker = styles[kind]
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour, marker=marker, markersize=4, linewidth=1.2, label=kind)
    axes.set_title("Error of each layer", fontsize=10)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative RMS error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, ncols=2, framealpha=0.9)


def _draw_shares(
    axes: Axes,
    kinds: dict[str, dict[int | None, ErrorReport]],
    styles: dict[str, tuple[str, str]],
) -> None:
    totals = [combine_reports(layers.values(), name=kind) for kind, layers in kinds.items()]
    error = sum(t.sum_squared_error for t in totals) or 1.0
    parameters = sum(t.num_elements for t in totals) or 1
    totals.sort(key=lambda t: t.sum_squared_error)
    shares = [t.sum_squared_error / error for t in totals]
    bars = axes.barh(
        [t.name for t in totals], shares, color=[styles[t.name][0] for t in totals], height=0.65
    )
    axes.bar_label(
        bars,
        [
            f"{s:.0%} ({t.num_elements / parameters:.0%})"
            for s, t in zip(shares, totals, strict=True)
        ],
        padding=3,
        fontsize=8,
    )
    axes.set_title("Share of the squared error (of the parameters)", fontsize=10)
    axes.set_xlim(0, max(shares, default=0.0) * 1.35 or 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)

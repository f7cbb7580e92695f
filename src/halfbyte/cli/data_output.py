"""How the findings of `halfbyte data` are printed, and what they are as JSON."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from halfbyte.cli.output import JsonValue, Output

if TYPE_CHECKING:
    from halfbyte.data.packing import PackingOptions
    from halfbyte.data.reading import Reading
    from halfbyte.data.report import EpochShape, Run, Size

BAR_WIDTH = 40
BEGIN_TRAINED, END_TRAINED = "⟦", "⟧"
"""Around trained tokens where there is no colour."""

SHOWN_FILES = 3


def show_reading(output: Output, location: str, reading: "Reading") -> None:
    """Print what was found in which format, notices and problems."""
    output.heading(f"Data {location}")
    files = reading.sources.files
    names = ", ".join(file.name for file in files[:SHOWN_FILES])
    more = f" and {len(files) - SHOWN_FILES} more" if len(files) > SHOWN_FILES else ""
    output.text(f"  files        {names}{more} ({files[0].kind})")
    choice = reading.choice or ("text (plain text files)" if not reading.problems.count else "?")
    output.text(f"  format       {choice}")
    output.text(f"  rows         {reading.num_rows}")
    output.text(f"  fingerprint  {reading.fingerprint}")
    for notice in reading.notices():
        output.text(f"  note: {notice}")
    for problem in reading.problems.listed:
        output.text(f"  problem: {problem}")
    if unlisted := reading.problems.count - len(reading.problems.listed):
        output.text(f"  and {unlisted} more problems")


def show_sizes(output: Output, sizes: Mapping[str, "Size"]) -> None:
    """Print tokens, targets and lengths of each part."""
    if not sizes:
        return
    output.heading("Tokens")
    columns = ["", "documents", "duplicates", "tokens", "targets", "mean", "median", "90 %", "99 %"]
    rows = [
        [
            name,
            size.num_documents,
            size.num_duplicates,
            size.num_tokens,
            size.num_targets,
            f"{size.lengths.mean:.0f}",
            size.lengths.p50,
            size.lengths.p90,
            size.lengths.p99,
        ]
        for name, size in sizes.items()
    ]
    output.table(columns, rows)
    for name, size in sizes.items():
        output.heading(f"Lengths of {name}, in tokens")
        highest = max(interval.count for interval in size.histogram)
        width = len(str(size.histogram[-1].last))
        for interval in size.histogram:
            bar = "█" * -(-interval.count * BAR_WIDTH // highest)
            output.text(
                f"  {interval.first:>{width}} - {interval.last:<{width}}  {bar} {interval.count}"
            )
        output.text(f"  longest: {size.lengths.longest} at {size.lengths.longest_at}")


def show_epoch(output: Output, packing: "PackingOptions", epoch: "EpochShape") -> None:
    """Print steps and micro-batches of an epoch."""
    output.heading("An epoch")
    output.text(
        f"  {epoch.num_steps} steps of at most {packing.tokens_per_step} tokens "
        f"(mean {epoch.mean_tokens:.0f}, of them {epoch.mean_targets:.0f} targets), in "
        f"{epoch.num_micro_batches} micro-batches of at most {packing.micro_batch_tokens}"
    )


def show_runs(output: Output, place: str, runs: Sequence["Run"]) -> None:
    """Print a document, the trained tokens green, or in brackets where there is no colour."""
    num_tokens = sum(len(run.ids) for run in runs)
    num_trained = sum(len(run.ids) for run in runs if run.trained)
    output.heading(f"{place}: {num_tokens} tokens, {num_trained} of them trained")
    if output.json or not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        output.text(
            "".join(
                f"{BEGIN_TRAINED}{run.text}{END_TRAINED}" if run.trained else run.text
                for run in runs
            )
        )
        return
    from rich.console import Console
    from rich.text import Text

    parts = [(run.text, "bold green" if run.trained else "dim") for run in runs]
    Console(highlight=False, soft_wrap=True).print(Text.assemble(*parts))


def reading_record(reading: "Reading") -> JsonValue:
    """What was found, as JSON."""
    choice = reading.choice
    return {
        "files": [str(file.path) for file in reading.sources.files],
        "ignored_files": reading.sources.ignored,
        "kind": reading.sources.files[0].kind,
        "format": None if choice is None else choice.format,
        "fields": None if choice is None else choice.fields,
        "reason": None if choice is None else choice.reason,
        "ignored_fields": reading.ignored_fields,
        "num_rows": reading.num_rows,
        "fingerprint": reading.fingerprint,
        "num_overlong": reading.overlong.count,
        "num_lost_tokens": reading.num_lost_tokens,
        "num_cut": reading.cut.count,
        "num_unseparated": reading.unseparated.count,
        "notices": reading.notices(),
        "problems": reading.problems.listed,
        "num_problems": reading.problems.count,
    }

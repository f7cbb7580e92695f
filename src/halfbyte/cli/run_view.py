"""A training run as it is shown: a live line on a terminal, plain lines now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from halfbyte.cli.output import Output, format_bytes

if TYPE_CHECKING:
    from rich.live import Live

    from halfbyte.memory.stats import PoolStats
    from halfbyte.training.run import RunResult

LINE_EVERY_SECONDS = 10.0
PROMPT_WIDTH = 72
STOPPED = 75

Record = Mapping[str, Any]


class RunView:
    """Shows the events of a run; with `--json` every record is a line on stdout."""

    def __init__(self, output: Output, live: "Live | None") -> None:
        self._output = output
        self._live = live
        self._num_steps = 0
        self._first_step = 1
        self._planned = ""
        self._begin = self._last_line = time.monotonic()

    def started(self, summary: Record) -> None:
        """Say what is trained on what."""
        self._num_steps = summary["num_steps"]
        self._first_step = summary["first_step"]
        self._begin = time.monotonic()
        above = f" on top of {summary['on_top_of']}" if summary["on_top_of"] else ""
        self._note(
            f"{summary['method']}{above}: {summary['num_trained']:,} trained parameters; "
            f"{summary['num_documents']:,} documents, {summary['num_tokens']:,} tokens; "
            f"{summary['num_held_out']:,} held out"
        )
        self._note(
            f"steps {self._first_step} to {self._num_steps}; micro-batches of at most "
            f"{summary['micro_batch_tokens']:,} tokens; {summary['recompute']} layers recomputed"
        )
        if (planned := summary["planned_bytes"]) is None:
            self._note("memory is not planned: there is no memory.budget")
        else:
            self._planned = f" of {format_bytes(planned)} planned"
        for notice in summary["notices"]:
            self._note(f"note: {notice}")
        self._output.emit({"event": "started", **summary})

    def stepped(self, record: Record) -> None:
        """Show the step, on a terminal always."""
        self._output.emit({"event": "step", **record})
        line = self._line(record)
        now = time.monotonic()
        if self._live is not None:
            self._live.update(line)
        elif now - self._last_line >= LINE_EVERY_SECONDS or record["step"] == self._num_steps:
            self._last_line = now
            self._note(line)

    def evaluated(self, record: Record) -> None:
        """Say how well held-out targets are predicted."""
        self._output.emit({"event": "evaluation", **record})
        perplexity = record["eval_perplexity"]
        self._note(
            f"step {record['step']}: held-out loss {record['eval_loss']:.4f}, perplexity "
            f"{'infinite' if perplexity is None else f'{perplexity:.3f}'}, "
            f"accuracy {record['eval_accuracy']:.1%}"
        )

    def sampled(self, records: Sequence[Record]) -> None:
        """Show the end of each prompt and how it was continued."""
        for record in records:
            self._output.emit({"event": "sample", **record})
            prompt, text = (_one_line(record[key]) for key in ("prompt", "text"))
            shown = prompt if len(prompt) <= PROMPT_WIDTH else f"...{prompt[-PROMPT_WIDTH:]}"
            self._note(f"  {shown}\n    -> {text}")

    def noted(self, text: str) -> None:
        """Say it."""
        self._output.emit({"event": "note", "text": text})
        self._note(text)

    def _line(self, record: Record) -> str:
        step = record["step"]
        taken = step - self._first_step + 1
        left = (time.monotonic() - self._begin) / taken * (self._num_steps - step)
        loss, norm = (
            "not finite" if record[key] is None else f"{record[key]:.4f}"
            for key in ("loss", "grad_norm")
        )
        peak = f"peak {format_bytes(record['peak_bytes'])}{self._planned}"
        return (
            f"step {step}/{self._num_steps}  loss {loss}  grad norm {norm}  "
            f"{record['tokens_per_second']:,.0f} tok/s  {peak}  {format_duration(left)} left"
        )

    def _note(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._output.note(text)


@contextlib.contextmanager
def watch(output: Output) -> Iterator[RunView]:
    """A view for the length of a run."""
    if not sys.stderr.isatty():
        yield RunView(output, None)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=4) as live:
        yield RunView(output, live)


def finish(output: Output, result: "RunResult") -> None:
    """Say how the run ended and what it left.

    Raises:
        typer.Exit: With 75, if it was stopped before its end.
    """
    outcome = result.outcome
    score = outcome.held_out
    output.emit(
        {
            "event": "finished",
            "ending": outcome.ending.value,
            "step": outcome.step,
            "run": str(result.directory),
            "result": None if result.result is None else str(result.result),
            "eval_loss": None if score is None else score.loss,
            "paging": None if outcome.paging is None else outcome.paging.record(),
        }
    )
    if result.result is None:
        output.text(f"stopped after step {outcome.step}; a checkpoint holds everything")
        output.text(f"go on with: halfbyte resume {result.directory}")
        raise typer.Exit(STOPPED)
    output.text(f"finished after step {outcome.step} ({outcome.ending.value})")
    if score is not None:
        output.text(f"held-out loss {score.loss:.4f}, perplexity {score.perplexity:.3f}")
    if outcome.paging is not None:
        output.text(_paging(outcome.paging))
    output.text(f"result: {result.result}")
    output.text(f"curve: {result.directory / 'loss.png'}")


def finish_merge(output: Output, result: "RunResult") -> None:
    """Write the standalone model that `output.merge` asks for, and say where it is."""
    from halfbyte.composition.runs import merge_result

    merged = merge_result(result).merged
    if merged is not None:
        output.text(f"merged: {merged}")
        output.emit({"event": "merged", "merged": str(merged)})


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _paging(stats: "PoolStats") -> str:
    visits = stats.hits + stats.prefetched + stats.misses
    return (
        f"paged: {format_bytes(stats.total_bytes)} of state and gradients in at most "
        f"{format_bytes(stats.peak_resident_bytes)}; {format_bytes(stats.paged_in_bytes)} in, "
        f"{format_bytes(stats.paged_out_bytes)} out; {stats.misses:,} of {visits:,} pages waited "
        f"for, {stats.stall_seconds:.1f} s; {stats.slow_tier}"
    )


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

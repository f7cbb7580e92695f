"""TensorBoard and Weights & Biases: a run is told to them, and nothing they do can stop it.

Both are optional packages, imported when a run asks for them. A writer that fails, at whatever
moment and for whatever reason, becomes one notice and is left alone from then on.
"""

import hashlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from halfbyte.training.config import Config, ReportName
from halfbyte.training.progress import Observer, Record

TENSORBOARD_DIRECTORY = "tensorboard"


class Writer(Protocol):
    """Where records of a run go besides its own files."""

    def write(self, record: Record) -> None:
        """A record of `metrics.jsonl`."""

    def write_texts(self, records: Sequence[Record]) -> None:
        """The records of `samples.jsonl` of one evaluation."""

    def close(self) -> None:
        """The run has ended."""


OpenWriter = Callable[[Config, int], Writer]
"""Opens a writer for a run whose next step is the given one."""


class Reports:
    """An observer that passes all it is told to another one, and to writers."""

    def __init__(
        self,
        observer: Observer,
        config: Config,
        writers: Mapping[ReportName, OpenWriter] | None = None,
    ) -> None:
        """Report to those that `output.report_to` names.

        Args:
            observer: Told of everything first, and of failures.
            config: Of the run.
            writers: How each is opened; by default the real ones.
        """
        self._observer = observer
        self._config = config
        self._known = writers or {"tensorboard": TensorBoardWriter, "wandb": WandbWriter}
        self._open: dict[ReportName, Writer] = {}

    def started(self, summary: Record) -> None:
        """Open the writers."""
        self._observer.started(summary)
        first_step = summary["first_step"]
        assert isinstance(first_step, int)  # noqa: S101  (of our own summary)
        for name in dict.fromkeys(self._config.output.report_to):
            self._try(name, partial(self._begin, name, first_step))

    def _begin(self, name: ReportName, first_step: int) -> None:
        self._open[name] = self._known[name](self._config, first_step)

    def stepped(self, record: Record) -> None:
        """Write the record."""
        self._observer.stepped(record)
        self._each(lambda writer: writer.write(record))

    def evaluated(self, record: Record) -> None:
        """Write the record."""
        self._observer.evaluated(record)
        self._each(lambda writer: writer.write(record))

    def sampled(self, records: Sequence[Record]) -> None:
        """Write the texts."""
        self._observer.sampled(records)
        self._each(lambda writer: writer.write_texts(records))

    def noted(self, text: str) -> None:
        """Notes are for the person who watches."""
        self._observer.noted(text)

    def close(self) -> None:
        """Close the writers, however the run ended."""
        self._each(lambda writer: writer.close())
        self._open.clear()

    def _each(self, use: Callable[[Writer], None]) -> None:
        for name, writer in list(self._open.items()):
            self._try(name, partial(use, writer))

    def _try(self, name: ReportName, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001  (somebody else's code: anything may come)
            self._open.pop(name, None)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._observer.noted(f"{name} is not reported to any more ({reason}); the run goes on")


class TensorBoardWriter:
    """Event files in `tensorboard/` of the run directory."""

    def __init__(self, config: Config, first_step: int) -> None:
        """Open a new file; what an earlier one says of steps still to come is taken back."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (optional, and slow)

        self._writer = SummaryWriter(
            str(Path(config.output.dir) / TENSORBOARD_DIRECTORY),
            purge_step=first_step if first_step > 1 else 0,
        )

    def write(self, record: Record) -> None:
        """One scalar a number."""
        for tag, value in scalars(record):
            self._writer.add_scalar(tag, value, record["step"])

    def write_texts(self, records: Sequence[Record]) -> None:
        """One text a prompt."""
        for number, record in enumerate(records):
            text = f"{record['prompt']}\n\n-> {record['text']}"
            self._writer.add_text(f"samples/{number}", text, record["step"])

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run; without network unless `WANDB_MODE` says otherwise.

    Its other settings (project, entity, name) come from its own environment variables.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        """Begin, or go on with, the run that belongs to the run directory."""
        del first_step  # it numbers steps by itself
        self._wandb = importlib.import_module("wandb")
        directory = config.output.dir
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "halfbyte"),
            mode=os.environ.get("WANDB_MODE", "offline"),
            id=hashlib.sha256(directory.encode()).hexdigest()[:16],
            resume="allow",
            dir=directory,
            config=config.model_dump(mode="json"),
        )

    def write(self, record: Record) -> None:
        """All numbers of the record at its step."""
        self._run.log(dict(scalars(record)), step=record["step"])

    def write_texts(self, records: Sequence[Record]) -> None:
        """A table of prompts and texts."""
        rows = [[record["prompt"], record["reference"], record["text"]] for record in records]
        table = self._wandb.Table(columns=["prompt", "reference", "text"], data=rows)
        self._run.log({"samples": table}, step=records[0]["step"] if records else None)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a record as `train/loss`, `eval/loss` and so on."""
    for key, value in record.items():
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            is_eval = key.startswith("eval_")
            yield (f"eval/{key.removeprefix('eval_')}" if is_eval else f"train/{key}"), value

"""A run from its config, or from where it stopped, to its result."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.errors import ConfigError, MissingFileError, StorageError
from halfbyte.kernels.backends import cpu_isa
from halfbyte.memory.allocator import return_freed_memory
from halfbyte.storage.lock import lock_directory
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.training.checkpoint import list_checkpoints, newest_valid
from halfbyte.training.choices import Choices
from halfbyte.training.choosing import choose
from halfbyte.training.config import Config
from halfbyte.training.config_file import load_config, write_config
from halfbyte.training.export import export_result, provenance
from halfbyte.training.interruption import listen_for_stop
from halfbyte.training.loss_plot import plot_losses
from halfbyte.training.methods import TrainedModel, attach_trained, open_base
from halfbyte.training.metrics import METRICS_FILE
from halfbyte.training.plan import Plan, planned_peak
from halfbyte.training.progress import Observer, Silent
from halfbyte.training.reports import Reports
from halfbyte.training.run_data import RunData, open_run_data
from halfbyte.training.samples import Samples
from halfbyte.training.session import Session, open_session, paging_directory
from halfbyte.training.trainer import Ending, Outcome, Trainer

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended and what it left.

    Attributes:
        directory: Of the run.
        outcome: Why it ended, after which step, how well.
        result: The adapter or model directory; None when the run was stopped before its end.
        merged: The base with the adapter in it, if `output.merge` asked for it.
    """

    directory: Path
    outcome: Outcome
    result: Path | None
    merged: Path | None = None


def train(config: Config, observer: Observer | None = None) -> RunResult:
    """Start a run.

    Raises:
        StorageError: The run directory holds a run already, or is in use, or the disk is full.
        ConfigError, DataError, FormatError, MissingFileError: Before any compute.
        DoesNotFitError: Memory or disk are not enough; the run directory is untouched.
        TrainingError: A step was not finite and `training.on_nan` is `stop`.
    """
    directory = Path(config.output.dir)
    if (directory / CONFIG_FILE).exists():
        raise StorageError(
            f"{directory} holds a run already",
            hint=f"Continue it: halfbyte resume {directory}. Or choose another output.dir.",
        )
    config = _with_absolute_paths(config)
    with _opened(config, directory) as opened:
        write_config(config, directory / CONFIG_FILE)
        return _finish(_begin(config, directory, opened), opened, observer)


def resume(directory: str | Path, observer: Observer | None = None) -> RunResult:
    """Take a run up again behind its newest valid checkpoint, with the same results.

    Raises:
        MissingFileError: There is no run.
        StorageError: Another process works on it.
        DataError: The data has changed.
    """
    directory = Path(directory)
    if not (directory / CONFIG_FILE).is_file():
        raise MissingFileError(f"{directory}: no run is here: it has no {CONFIG_FILE}")
    config = load_config(directory / CONFIG_FILE)
    with _opened(config, directory) as opened:
        session = _begin(config, directory, opened, observer or Silent())
        return _finish(session, opened, observer)


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """Inputs of a run, and what was decided from them."""

    tokenizer: Tokenizer
    data: RunData
    model: TrainedModel
    choices: Choices
    plan: Plan | None


@contextlib.contextmanager
def _opened(config: Config, directory: Path) -> Iterator[_Opened]:
    """All inputs, checked before the run directory is touched; then the directory, locked."""
    _require_mergeable(config)
    tokenizer = Tokenizer.load(config.model)
    base = open_base(config)
    data = open_run_data(config, tokenizer)
    choices, plan = Choices.read(directory), None
    if choices is None:
        choices, plan = choose(config, base, data)
    return_freed_memory()
    model = attach_trained(base, config)
    directory.mkdir(parents=True, exist_ok=True)
    with lock_directory(directory):
        if config.optimizer.paged:
            paging_directory(config, directory)
        yield _Opened(tokenizer, data, model, choices, plan)


def _begin(
    config: Config, directory: Path, opened: _Opened, observer: Observer | None = None
) -> Session:
    choices = opened.choices
    if Choices.read(directory) is None:
        if opened.plan is not None:
            opened.plan.write(directory)
        choices.write(directory)
    torch.set_num_threads(choices.num_threads)
    checkpoint, skipped = newest_valid(directory)
    if observer is not None:
        for entry in skipped:
            observer.noted(f"passed over {entry.path}: {entry.reason}")
        if checkpoint is None:
            observer.noted("no checkpoint to resume from: starting at step 0")
        if choices.kernels != cpu_isa():
            observer.noted(
                f"begun with {choices.kernels} kernels, going on with {cpu_isa()}: "
                "results will differ from an uninterrupted run by rounding"
            )
    return open_session(config, directory, opened.model, opened.data, choices, checkpoint)


def _finish(session: Session, opened: _Opened, observer: Observer | None) -> RunResult:
    tokenizer, data = opened.tokenizer, opened.data
    session.samples = _samples(session, tokenizer)
    reports = Reports(observer or Silent(), session.config)
    with contextlib.closing(reports), listen_for_stop() as stop:
        reports.started(_summary(session, data))
        outcome = Trainer(session, reports, stop).run()
    if outcome.ending is Ending.STOPPED:
        return RunResult(session.directory, outcome, None)
    origin = provenance(session.config, data, outcome.step, session.model.below)
    result = export_result(session.model, session.config, session.directory, origin)
    plot_losses(session.directory / METRICS_FILE, session.directory / "loss.png")
    return RunResult(session.directory, outcome, result)


def _samples(session: Session, tokenizer: Tokenizer) -> Samples | None:
    training = session.config.training
    if session.held_out is None or not training.num_samples:
        return None
    return Samples(
        session.held_out,
        tokenizer,
        count=training.num_samples,
        max_new_tokens=training.sample_tokens,
    )


def _summary(session: Session, data: RunData) -> dict[str, object]:
    parameters = session.model.parameters.values()
    return {
        "model": session.config.model,
        "method": session.config.training.method,
        "on_top_of": None if session.model.below is None else session.model.below.order,
        "num_trained": sum(parameter.numel() for parameter in parameters),
        "num_documents": len(data.train),
        "num_tokens": data.train.num_tokens,
        "num_held_out": 0 if data.held_out is None else len(data.held_out),
        "first_step": session.counters.step + 1,
        "num_steps": session.schedule.num_steps,
        "micro_batch_tokens": session.choices.micro_batch_tokens,
        "recompute": session.choices.recompute,
        "planned_bytes": planned_peak(session.directory),
        "notices": list(data.notices),
        "checkpoints": [str(path) for path in list_checkpoints(session.directory)],
    }


def _require_mergeable(config: Config) -> None:
    wanted = config.output.merge
    if wanted == "none":
        return
    if config.training.method == "full":
        raise ConfigError(
            f"output.merge {wanted}: an adapter expected; training.method full leaves a model"
        )
    if config.lora.on_top_of is not None:
        raise ConfigError(
            f"output.merge {wanted}: lora.on_top_of leaves an adapter for a base with another one",
            hint="`halfbyte compose` makes one adapter of both, and `halfbyte merge` a model.",
        )


def _with_absolute_paths(config: Config) -> Config:
    """The config as a resume from anywhere needs it."""
    section = config.data
    paths = {
        name: str(Path(value).absolute())
        for name in ("train", "eval")
        if (value := getattr(section, name)) is not None
    }
    lora = config.lora
    if lora.on_top_of is not None:
        lora = lora.model_copy(update={"on_top_of": str(Path(lora.on_top_of).absolute())})
    if lora.init_weights is not None and Path(lora.init_weights).exists():  # else it is a hub id
        lora = lora.model_copy(update={"init_weights": str(Path(lora.init_weights).absolute())})
    optimizer = config.optimizer
    if optimizer.directory is not None:
        absolute = str(Path(optimizer.directory).absolute())
        optimizer = optimizer.model_copy(update={"directory": absolute})
    return config.model_copy(
        update={
            "lora": lora,
            "model": str(Path(config.model).absolute()),
            "data": section.model_copy(update=paths),
            "optimizer": optimizer,
            "output": config.output.model_copy(
                update={"dir": str(Path(config.output.dir).absolute())}
            ),
        }
    )

"""What a run works with, and the part of it that a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from halfbyte.adapters.stack import ON_TOP_OF
from halfbyte.data.dataset import Dataset
from halfbyte.data.packing import PackingOptions
from halfbyte.data.steps import Step, StepStream
from halfbyte.errors import FormatError, VerificationError
from halfbyte.memory.tiers import on_disk
from halfbyte.optim.accumulators import Accumulator
from halfbyte.optim.factory import make_optimizer, weight_decay_groups
from halfbyte.optim.optimizer import StatefulOptimizer
from halfbyte.training.checkpoint import Checkpoint
from halfbyte.training.choices import Choices
from halfbyte.training.config import Config
from halfbyte.training.loss_scale import LossScale
from halfbyte.training.methods import TrainedModel
from halfbyte.training.samples import Samples
from halfbyte.training.schedule import Schedule


class Documents(Protocol):
    """What a session needs of its data: `RunData`, or what a probe makes up."""

    @property
    def train(self) -> Dataset:
        """Documents to learn from."""
        ...

    @property
    def held_out(self) -> Dataset | None:
        """Documents to evaluate on."""
        ...


class StepSource(Protocol):
    """Steps one after the other, and where they stand: a `StepStream`, or what a probe makes up."""

    def __next__(self) -> Step:
        """The next step."""
        ...

    def state(self) -> dict[str, int | str]:
        """The position behind it."""
        ...


@dataclass(slots=True)
class Counters:
    """Where a run stands after a step.

    Attributes:
        step: Optimizer steps taken, left-out ones included.
        num_tokens: That went through the model.
        num_targets: That were learned from.
        best_loss: Of all evaluations.
        num_worse: Evaluations since the best one.
    """

    step: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    best_loss: float | None = None
    num_worse: int = 0


@dataclass(slots=True, eq=False)
class Session:
    """A run in memory.

    Attributes:
        config: Resolved.
        directory: Of the run.
        model: Decoder and what is trained.
        optimizer: Over what is trained.
        accumulator: Where the gradients of a step add up.
        stream: Steps of training data; its position is part of checkpoints.
        held_out: Evaluation data, or None.
        schedule: Of the learning rate; knows the number of steps.
        choices: Fixed for all of the run.
        counters: Where the run stands.
        loss_scale: For fp16.
        samples: Held-out prompts to continue at evaluations, or None.
    """

    config: Config
    directory: Path
    model: TrainedModel
    optimizer: StatefulOptimizer
    accumulator: Accumulator
    stream: StepSource
    held_out: Dataset | None
    schedule: Schedule
    choices: Choices
    counters: Counters = field(default_factory=Counters)
    loss_scale: LossScale = field(default_factory=LossScale)
    samples: Samples | None = None

    @property
    def fingerprints_below(self) -> list[str]:
        """Of the frozen adapters, lowest first."""
        below = self.model.below
        return [] if below is None else [part.fingerprint for part in below.parts]

    def snapshot(self, position: Mapping[str, int | str]) -> Checkpoint:
        """The state after the last complete step.

        Args:
            position: Of the stream behind that step.
        """
        return Checkpoint(
            step=self.counters.step,
            trained={name: tensor.detach() for name, tensor in self.model.saved.items()},
            optimizer=self.optimizer.state_tensors(),
            state={
                "counters": asdict(self.counters),
                "loss_scale": asdict(self.loss_scale),
                "position": dict(position),
                ON_TOP_OF: self.fingerprints_below,
            },
        )


def open_session(
    config: Config,
    directory: Path,
    model: TrainedModel,
    data: Documents,
    choices: Choices,
    checkpoint: Checkpoint | None = None,
) -> Session:
    """Everything a run needs, at its beginning or where a checkpoint stands.

    Raises:
        DataError: No document fits the micro-batches, or the data changed since the checkpoint.
        FormatError: The checkpoint is of other parameters.
        VerificationError: The frozen adapters changed since the checkpoint.
    """
    training, settings = config.training, config.optimizer
    options = PackingOptions(
        tokens_per_step=training.tokens_per_step,
        micro_batch_tokens=choices.micro_batch_tokens,
        seed=training.seed,
        group_by_length=config.data.group_by_length,
    )
    optimizer = make_optimizer(
        settings.name,
        [dict(g) for g in weight_decay_groups(model.parameters.items(), training.weight_decay)],
        fast_bytes=settings.fast_bytes,
        directory=paging_directory(config, directory) if settings.paged else None,
        lr=training.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
    )
    stream = StepStream(data.train, options)
    schedule = Schedule.from_ratio(
        training.scheduler, count_steps(config, stream), training.warmup_ratio
    )
    session = Session(
        config,
        directory,
        model,
        optimizer,
        optimizer.accumulator(model.stand_ins),
        stream,
        data.held_out,
        schedule,
        choices,
    )
    session.loss_scale = LossScale.for_dtype(training.compute_dtype)
    if checkpoint is not None:
        _restore(session, checkpoint, data, options)
    return session


def paging_directory(config: Config, directory: Path) -> Path:
    """Where a paged optimizer of a run in `directory` keeps what does not fit.

    Raises:
        UsageError: It does not exist, or is in RAM.
    """
    named = config.optimizer.directory
    return on_disk(directory if named is None else Path(named))


def count_steps(config: Config, stream: StepStream) -> int:
    """Steps of the whole run: `max_steps`, or those of `num_epochs`, rounded up."""
    if config.training.max_steps is not None:
        return config.training.max_steps
    whole, part = divmod(config.training.num_epochs, 1)
    steps = stream.total_steps(int(whole))
    return steps + -int(-part * stream.num_steps(int(whole)) // 1) if part else steps


def _restore(
    session: Session, checkpoint: Checkpoint, data: Documents, options: PackingOptions
) -> None:
    parameters = session.model.saved
    _require_same_parameters(session, checkpoint)
    if checkpoint.state.get(ON_TOP_OF, []) != session.fingerprints_below:
        raise VerificationError(
            f"{session.config.lora.on_top_of}: not the adapters that this run was begun on",
            hint="Put back those that the run was begun on, or start another run.",
        )
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(checkpoint.trained[name])
    session.model.refresh()
    session.optimizer.load_state_tensors(checkpoint.optimizer)
    sections = {
        name: section
        for name in ("counters", "loss_scale", "position")
        if isinstance(section := checkpoint.state.get(name), dict)
    }
    try:
        session.counters = Counters(**sections["counters"])
        session.loss_scale = LossScale(**sections["loss_scale"])
        position = sections["position"]
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"checkpoint of step {checkpoint.step}: its state is incomplete: {error}"
        ) from error
    session.stream = StepStream.from_state(data.train, options, position)


def _require_same_parameters(session: Session, checkpoint: Checkpoint) -> None:
    ours = {name: list(tensor.shape) for name, tensor in session.model.saved.items()}
    theirs = {name: list(tensor.shape) for name, tensor in checkpoint.trained.items()}
    problems = [
        f"{name}: {ours.get(name, 'absent')} here, {theirs.get(name, 'absent')} in the checkpoint"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if problems:
        raise FormatError(
            f"the checkpoint of step {checkpoint.step} is of other parameters", problems=problems
        )

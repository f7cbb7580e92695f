"""The loop: steps, evaluations and checkpoints, until the end or until asked to stop."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import NoReturn

from halfbyte.data.batch import Batch, evaluation_batches
from halfbyte.data.steps import Step
from halfbyte.errors import HalfbyteError, StorageError, TrainingError
from halfbyte.kernels import activations
from halfbyte.layers.lora import fold_seed
from halfbyte.memory.allocator import trim_heap
from halfbyte.memory.resident import PeakSampler, peak_bytes
from halfbyte.memory.stats import PoolStats
from halfbyte.training.checkpoint import prune_checkpoints, write_checkpoint
from halfbyte.training.diagnosis import NonFinite, find_non_finite
from halfbyte.training.held_out import HeldOutScore, score_held_out
from halfbyte.training.interruption import StopRequest
from halfbyte.training.metrics import METRICS_FILE, RecordFile
from halfbyte.training.progress import Observer
from halfbyte.training.room import Room, set_aside
from halfbyte.training.samples import SAMPLES_FILE
from halfbyte.training.session import Session
from halfbyte.training.step import Gradients, compute_gradients, reusing_activations


class Ending(StrEnum):
    """Why a run ended."""

    COMPLETE = "complete"
    EARLY = "no better held-out loss"
    STOPPED = "asked to stop"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        ending: Why.
        step: Steps taken.
        held_out: The last evaluation, or None.
        paging: What a paged optimizer held and moved since the run was begun or resumed, or None.
    """

    ending: Ending
    step: int
    held_out: HeldOutScore | None
    paging: PoolStats | None


class _Stop(Exception):  # noqa: N818  (not an error: the way out of an unfinished step)
    """Asked to stop between two micro-batches."""


class Trainer:
    """Takes a session from where it stands to its end.

    A step is applied whole or not at all, and then recorded, evaluated and saved in this order.
    So a checkpoint's step is always recorded, and resuming repeats nothing that was.
    """

    def __init__(
        self,
        session: Session,
        observer: Observer,
        stop: StopRequest,
        *,
        least_reused: int = activations.LEAST_BYTES,
    ) -> None:
        """`least_reused`: bytes of an activation from which on its memory is used again."""
        self._least_reused = least_reused
        self._session = session
        self._observer = observer
        self._stop = stop
        # What was recorded before the first step is recorded again when that is still to come.
        begun = -1 if self._at_beginning() else session.counters.step
        self._metrics = RecordFile(session.directory / METRICS_FILE, resume_step=begun)
        self._texts = (
            None
            if session.samples is None
            else RecordFile(session.directory / SAMPLES_FILE, resume_step=begun)
        )
        self._position = session.stream.state()
        self._saved_step = session.counters.step or None
        self._last_score: HeldOutScore | None = None
        self._failure = ""

    def run(self) -> Outcome:
        """Train.

        Returns:
            Why it ended. After `STOPPED` a checkpoint holds the last complete step.

        Raises:
            TrainingError: A step was not finite and `training.on_nan` is `stop`.
            StorageError: The disk is full, or failed under a paged optimizer; the last checkpoint
                is valid, and of the last complete step if it could be written.
        """
        optimizer = self._session.optimizer
        parameters = self._session.model.parameters.values()
        with (
            reusing_activations(parameters, least=self._least_reused),
            PeakSampler(aside=partial(set_aside, optimizer)) as sampler,
        ):
            room = Room(optimizer, sampler)
            try:
                ending = self._steps(sampler, room)
            finally:
                self._metrics.close()
                if self._texts is not None:
                    self._texts.close()
        paging = optimizer.stats() if optimizer.paged else None
        return Outcome(ending, self._session.counters.step, self._last_score, paging)

    def _steps(self, sampler: PeakSampler, room: Room) -> Ending:
        session = self._session
        training = session.config.training
        if training.eval_first and self._at_beginning():
            self._evaluate()
        while session.counters.step < session.schedule.num_steps:
            step = next(session.stream)
            try:
                self._take(step, sampler, room)
            except _Stop:
                self._save()
                return Ending.STOPPED
            except StorageError as error:
                error.hint = self._rescue(error)
                raise
            number = session.counters.step
            last = number == session.schedule.num_steps
            epoch_ends = step.index == step.num_steps - 1
            evaluated = last or _due(number, training.eval_steps, at_epoch_end=epoch_ends)
            if evaluated:
                self._evaluate()
            if training.patience and session.counters.num_worse >= training.patience:
                self._save()
                return Ending.EARLY
            if last or _due(number, training.save_steps, at_epoch_end=evaluated):
                self._save()
            if self._stop.pending and not last:
                self._save()
                return Ending.STOPPED
        return Ending.COMPLETE

    def _at_beginning(self) -> bool:
        """Whether neither a step nor an evaluation was made."""
        counters = self._session.counters
        return counters.step == 0 and counters.best_loss is None

    def _take(self, step: Step, sampler: PeakSampler, room: Room) -> None:
        session = self._session
        counters = session.counters
        session.optimizer.require_usable()
        moved = session.optimizer.stats()
        begin = time.perf_counter()
        gradients = self._gradients(step, room)
        rate = session.config.training.learning_rate * session.schedule.factor(counters.step)
        record: dict[str, object] = {
            "step": counters.step + 1,
            "epoch": step.epoch,
            "loss": _number(gradients.loss),
            "grad_norm": _number(gradients.norm),
            "learning_rate": rate,
            "num_tokens": gradients.num_tokens,
            "num_targets": gradients.num_targets,
        }
        if session.loss_scale.dynamic:
            record["loss_scale"] = session.loss_scale.scale
        if gradients.finite:
            for group in session.optimizer.param_groups:
                group["lr"] = rate
            session.optimizer.step()
            session.model.refresh()
            session.loss_scale.succeed()
        else:
            record["not_applied"] = asdict(self._diagnose(step))
            if session.config.training.on_nan == "stop":
                self._metrics.append(record)
                self._give_up()
        counters.step += 1
        counters.num_tokens += gradients.num_tokens
        counters.num_targets += gradients.num_targets
        self._position = session.stream.state()
        seconds = time.perf_counter() - begin
        record |= {
            "seconds": seconds,
            "tokens_per_second": gradients.num_tokens / seconds,
            "peak_bytes": peak_bytes(),
            "peak_private_bytes": sampler.peak,
        }
        if session.optimizer.paged:
            record["paging"] = session.optimizer.stats().since(moved).record()
        self._metrics.append(record)
        self._observer.stepped(record)

    def _gradients(self, step: Step, room: Room) -> Gradients:
        session = self._session

        @contextmanager
        def around(batch: Batch) -> Iterator[None]:
            with room.around(batch.num_tokens):
                yield
            trim_heap()
            if self._stop.pending:
                raise _Stop

        while True:
            gradients = compute_gradients(
                session.model.decoder,
                step.micro_batches,
                session.accumulator,
                recompute=session.choices.recompute,
                dropout_seed=self._dropout_seed(),
                loss_scale=session.loss_scale.scale,
                max_norm=session.config.training.max_grad_norm,
                around=around,
            )
            # An overflow in float16 says that the scale was too large, not that the run is lost.
            if gradients.finite or not session.loss_scale.back_off():
                return gradients

    def _dropout_seed(self) -> int:
        return fold_seed(self._session.config.training.seed, self._session.counters.step)

    def _diagnose(self, step: Step) -> NonFinite:
        session = self._session
        base = self._dropout_seed()
        seeds = [fold_seed(base, index) for index in range(len(step.micro_batches))]
        found = find_non_finite(
            session.model.decoder,
            step.micro_batches,
            session.model.parameters,
            session.accumulator,
            seeds,
        )
        self._failure = (
            f"step {session.counters.step + 1} was not applied: {found.where} is not finite; "
            f"documents: {', '.join(found.rows[:8])}{' ...' if len(found.rows) > 8 else ''}"  # noqa: PLR2004
        )
        self._observer.noted(self._failure)
        return found

    def _give_up(self) -> NoReturn:
        self._save()
        raise TrainingError(
            self._failure,
            hint="Lower the learning rate, remove the documents, or leave such steps out with "
            "training.on_nan=skip.",
        )

    def _evaluate(self) -> None:
        session = self._session
        if session.held_out is None:
            return
        begin = time.perf_counter()
        activations.release()
        batches = evaluation_batches(session.held_out, session.choices.micro_batch_tokens)
        score = score_held_out(session.model.decoder, batches)
        activations.release()
        counters = session.counters
        if counters.best_loss is None or score.loss < counters.best_loss:
            counters.best_loss, counters.num_worse = score.loss, 0
        else:
            counters.num_worse += 1
        self._last_score = score
        record = {
            "step": counters.step,
            "eval_loss": score.loss,
            "eval_perplexity": _number(score.perplexity),
            "eval_accuracy": score.accuracy,
            "eval_targets": score.num_targets,
            "eval_seconds": time.perf_counter() - begin,
        }
        self._metrics.append(record)
        self._observer.evaluated(record)
        self._sample()

    def _sample(self) -> None:
        session = self._session
        if session.samples is None or self._texts is None:
            return
        texts = session.samples.generate(session.model.decoder)
        records = [{"step": session.counters.step, **text} for text in texts]
        for record in records:
            self._texts.append(record)
        self._observer.sampled(records)

    def _rescue(self, error: StorageError) -> str:
        """Save the last complete step after storage failed in the next; how to go on."""
        session = self._session
        try:
            self._save()
        except HalfbyteError as second:  # what failed first is what the user must know
            self._observer.noted(f"step {session.counters.step} cannot be saved: {second}")
        saved = self._saved_step
        if saved is None:
            return error.hint
        return (
            f"The run goes on from step {saved}, which is saved. Mend the disk, or name another as "
            f"optimizer.directory in {session.directory / 'config.yaml'}. "
            f"Then: halfbyte resume {session.directory}"
        )

    def _save(self) -> None:
        session = self._session
        if self._saved_step == session.counters.step:
            return
        self._metrics.sync()
        if self._texts is not None:
            self._texts.sync()
        try:
            path = write_checkpoint(session.directory, session.snapshot(self._position))
        except HalfbyteError as error:
            error.hint = f"{error.hint} Then: halfbyte resume {session.directory}".strip()
            raise
        self._saved_step = session.counters.step
        prune_checkpoints(session.directory, session.config.training.keep_checkpoints)
        self._observer.noted(f"saved {path}")


def _due(step: int, every: int | None, *, at_epoch_end: bool) -> bool:
    return at_epoch_end if every is None else step % every == 0


def _number(value: float) -> float | None:
    # JSON has no NaN: what is not a number is null.
    return value if math.isfinite(value) else None

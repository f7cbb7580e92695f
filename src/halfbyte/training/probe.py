"""A few real steps on made-up documents, in a process of their own, with their memory measured.

    python -m halfbyte.training.probe < request.json

The steps are taken by the trainer itself, so whatever a layer saves, an optimizer keeps or a
kernel borrows is in the figures without anybody listing it.

Prints one JSON object: a `ProbeReport`, or `error`.
"""

import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from halfbyte.data.batch import Batch, build_batch
from halfbyte.data.dataset import Dataset
from halfbyte.data.rows import Origin
from halfbyte.data.steps import Step
from halfbyte.data.store import StoreBuilder
from halfbyte.errors import HalfbyteError
from halfbyte.kernels import activations, workspace
from halfbyte.kernels.backends import cpu_isa
from halfbyte.layers.cross_entropy import Head, rows_at_once
from halfbyte.memory.allocator import return_freed_memory
from halfbyte.memory.available import available_memory
from halfbyte.memory.resident import kilobyte_lines, resident
from halfbyte.models.decoder import Decoder
from halfbyte.training.choices import Choices
from halfbyte.training.config import Config
from halfbyte.training.held_out import score_held_out
from halfbyte.training.interruption import StopRequest
from halfbyte.training.methods import attach_trained, open_base
from halfbyte.training.places import Places, WatchedStore, watch_gradients
from halfbyte.training.probe_report import ProbeReport, ProbeRequest, StepMemory
from halfbyte.training.progress import Record, Silent
from halfbyte.training.session import Session, open_session
from halfbyte.training.shapes import MicroBatchShape
from halfbyte.training.trainer import Trainer

EARLIER_TOKENS = 32
"""Of the micro-batch that makes gradients before the others, in each step if those accumulate."""

NUM_WARM = 2
"""Steps before those that are reported."""

BLOCK_BYTES = 16 * 2**10
"""Blocks from this size on come straight from the system: in small steps, too, most of them should,
as in the steps to predict."""

NEVER = 10**9


@dataclass(frozen=True, slots=True, eq=False)
class _Documents:
    """Made-up data in the form that a session takes."""

    train: Dataset
    held_out: Dataset | None = None


class _Steps:
    """In the place of a stream: steps of the given micro-batches, one after the other."""

    def __init__(self, steps: Sequence[tuple[Batch, ...]]) -> None:
        self._steps = iter(steps)

    def __next__(self) -> Step:
        return Step(0, 0, NEVER, next(self._steps))

    def state(self) -> dict[str, int | str]:
        """There is no way back."""
        return {}


class _Measured(Exception):  # noqa: N818  (not an error: the way out of the trainer)
    """The last step was taken; nothing is evaluated or saved."""


class _Watch(Silent):
    """Collects what each step took; decides how many layers the next one recomputes."""

    def __init__(self, session: Session, places: Places, recompute: Sequence[int]) -> None:
        self._session = session
        self._places = places
        self._recompute = list(recompute)
        self.taken: list[tuple[dict[int, int], int, float]] = []

    def stepped(self, record: Record) -> None:
        """A step is over."""
        self._places.pass_by()
        activations.release()  # of blocks of another size
        seconds = record["seconds"]
        assert isinstance(seconds, float)  # noqa: S101  (the trainer's own)
        self.taken.append((self._places.peaks, self._places.kept, seconds))
        if len(self.taken) == len(self._recompute):
            raise _Measured
        layers = self._recompute[len(self.taken)]
        self._session.choices = replace(self._session.choices, recompute=layers)
        self._places.begin()


def probe(request: ProbeRequest) -> ProbeReport:
    """Measure in this process, which should have done nothing else."""
    torch.set_num_threads(request.num_threads)
    base = open_base(request.config)
    return_freed_memory(BLOCK_BYTES)
    start, mapped = resident().total, resident().file
    model = attach_trained(base, request.config)
    places = Places(start)
    watch_gradients(model, places)
    head = model.decoder.head
    model.decoder.head = Head(head.weight, WatchedStore(head.store, places), head.softcap)

    shapes, layers = zip(*schedule(request), strict=True)
    dataset, batches = _documents(shapes, base.config.vocabulary_size)
    steps = [
        (batches[0], batch) if request.accumulate and index else (batch,)
        for index, batch in enumerate(batches)
    ]
    session = open_session(
        _without_ends(request.config),
        request.directory,
        model,
        _Documents(dataset),
        Choices(NEVER, 0, request.num_threads, cpu_isa()),
    )
    session.stream = _Steps(steps)
    watch = _Watch(session, places, layers)
    with contextlib.suppress(_Measured):
        Trainer(session, watch, StopRequest(), least_reused=BLOCK_BYTES).run()
    vocabulary = base.config.vocabulary_size
    measured = [
        StepMemory(
            num_tokens=batch.num_tokens,
            recompute=count,
            loss_rows=rows_at_once(batch.num_targets, vocabulary),
            peaks=tuple(peaks[place] for place in sorted(peaks)),
            kept=kept,
            seconds=seconds,
        )
        for batch, count, (peaks, kept, seconds) in zip(batches, layers, watch.taken, strict=True)
    ]
    num_trained = sum(tensor.numel() for tensor in model.parameters.values())
    parts = {
        "mapped files": max(resident().file - mapped, 0),
        "trained parameters": 4 * num_trained,
        # Paged ones are in the pool, with the state.
        "gradients": 0 if request.config.optimizer.paged else 4 * num_trained,
        "optimizer state": session.optimizer.stats().resident_bytes,
        "workspace": workspace.held_bytes(),
    }
    evaluated = batches[NUM_WARM : NUM_WARM + len(request.shapes)] if request.evaluate else []
    return ProbeReport(
        steps=tuple(measured[NUM_WARM:]),
        evaluations=tuple(_evaluate(model.decoder, batch, places) for batch in evaluated),
        parts=parts,
        earlier_seconds=measured[0].seconds,
    )


def schedule(request: ProbeRequest) -> list[tuple[MicroBatchShape, int]]:
    """The steps to take: the last micro-batch of each, and how many layers it recomputes.

    The first makes gradients and optimizer state. Few rows are multiplied without the workspaces
    that many take, so those come with a second, as large as any; it keeps no more than what is
    asked for, which may be all that fits.
    """
    first = request.shapes[0]
    earlier = first.resized(min(EARLIER_TOKENS, first.num_tokens))
    warm = [(shape, request.recompute[0]) for shape in (earlier, request.shapes[-1])]
    return warm + [(shape, count) for count in request.recompute for shape in request.shapes]


def _evaluate(decoder: Decoder, batch: Batch, places: Places) -> StepMemory:
    """Score a batch; all that happens after its forward counts as the loss."""
    begin = time.perf_counter()
    places.begin(one_pass=True)
    with activations.reusing(least=BLOCK_BYTES):
        score_held_out(decoder, [batch])
    places.pass_by()
    forward, *scoring = (places.peaks[place] for place in sorted(places.peaks))
    return StepMemory(
        num_tokens=batch.num_tokens,
        recompute=0,
        loss_rows=rows_at_once(batch.num_targets, decoder.config.vocabulary_size),
        peaks=(forward, max(scoring)),
        kept=places.kept,
        seconds=time.perf_counter() - begin,
    )


def _documents(shapes: Sequence[MicroBatchShape], vocabulary: int) -> tuple[Dataset, list[Batch]]:
    """A batch of random tokens for each shape, and all documents as a data set."""
    generator = torch.Generator().manual_seed(0)
    builder = StoreBuilder()
    numbers: list[range] = []
    count = 0
    for shape in shapes:
        untrained = shape.num_tokens - len(shape.lengths) - shape.num_targets
        for length in shape.lengths:
            ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
            skipped = min(max(untrained, 0), length - 1)
            untrained -= skipped
            trained = [index > skipped for index in range(length)]
            builder.add(ids, trained, Origin("probe", count), row_digest=count, prompt_digest=count)
            count += 1
        numbers.append(range(count - len(shape.lengths), count))
    store = builder.build()
    dataset = Dataset(store, torch.arange(count).numpy())
    return dataset, [build_batch(dataset, documents) for documents in numbers]


def _without_ends(config: Config) -> Config:
    """The config with steps only: no evaluation, no checkpoint, no samples."""
    changes = {
        "max_steps": NEVER,
        "tokens_per_step": NEVER,
        "eval_first": False,
        "eval_steps": NEVER,
        "save_steps": NEVER,
        "num_samples": 0,
        "on_nan": "skip",
    }
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def _limit_memory() -> None:
    """Let allocations fail that the machine cannot serve, before it kills a process for them."""
    status = kilobyte_lines(Path("/proc/self/status").read_text())
    limit = status["VmData"] + available_memory().bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def main() -> None:
    """Answer the request on stdin."""
    request = ProbeRequest.from_json(sys.stdin.read())
    _limit_memory()
    answer: dict[str, object]
    try:
        with tempfile.TemporaryDirectory(dir=request.directory, prefix=".halfbyte-plan-") as path:
            answer = asdict(probe(replace(request, directory=Path(path))))
    except HalfbyteError as error:
        answer = {"error": str(error)}
    except (MemoryError, RuntimeError) as error:
        # PyTorch reports a failed allocation as a RuntimeError.
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        answer = {"error": "out of memory", "out_of_memory": True}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()

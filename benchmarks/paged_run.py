"""A training run whose steps the paging benchmarks take one by one."""

import argparse
import json
import os
import resource
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.data.batch import Batch
from halfbyte.layers.segments import pack
from halfbyte.memory.allocator import return_freed_memory
from halfbyte.memory.stats import PoolStats
from halfbyte.optim.accumulators import Accumulator, Lender
from halfbyte.optim.factory import make_optimizer, weight_decay_groups
from halfbyte.optim.optimizer import StatefulOptimizer
from halfbyte.training.config_file import load_config
from halfbyte.training.methods import TrainedModel, attach_trained, open_base
from halfbyte.training.step import compute_gradients, reusing_activations

MB = 10**6
LENGTH = 512
_OTHERS = 0.1  # of a core; the kernel's own threads, which move the pages, are others too
NOTHING = "nothing"
"""In the place of an optimizer: gradients are dropped as soon as a backward pass has them."""


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One step.

    Attributes:
        seconds: All of it.
        update_seconds: Of the optimizer's part, when no backward pass hides a transfer.
        stall_seconds: Waiting for the disk.
        moved_bytes: Both ways.
        moved_in_update: Of them, in the optimizer's part.
        others_seconds: Processor time that other processes took, and other machines of the host.
        page_faults: In all of it; None in records from before they were counted.
    """

    seconds: float
    update_seconds: float
    stall_seconds: float
    moved_bytes: int
    moved_in_update: int
    others_seconds: float
    page_faults: int | None = None

    @property
    def alone(self) -> bool:
        """Whether others took so little that the times mean something."""
        return self.others_seconds < _OTHERS * self.seconds


@dataclass
class Run:
    """A model and what trains it; no optimizer for `NOTHING`."""

    model: TrainedModel
    optimizer: StatefulOptimizer | None
    accumulator: Accumulator
    batch: Batch
    short: Batch

    def reusing(self) -> AbstractContextManager[None]:
        """In which steps are to be taken."""
        return reusing_activations(self.model.parameters.values())

    def settle(self) -> None:
        """Take a step of one document: after it the pool is as after any step."""
        self._take(self.short)

    def step(self) -> StepFigures:
        """Take a step as `halfbyte train` does."""
        return self._take(self.batch)

    def _take(self, batch: Batch) -> StepFigures:
        before, others, faults = self.stats(), _others_seconds(), _page_faults()
        begun = time.perf_counter()
        compute_gradients(self.model.decoder, [batch], self.accumulator, max_norm=1.0)
        between = self.stats()
        update = time.perf_counter()
        if self.optimizer is not None:
            self.optimizer.step()
            self.model.refresh()
        ended = time.perf_counter()
        after = self.stats()
        moved = after.since(before)
        return StepFigures(
            ended - begun,
            ended - update,
            moved.stall_seconds,
            _moved_bytes(moved),
            _moved_bytes(after.since(between)),
            _others_seconds() - others,
            _page_faults() - faults,
        )

    def stats(self) -> PoolStats:
        """Of the optimizer's state and gradients."""
        return PoolStats() if self.optimizer is None else self.optimizer.stats()


class Dropped:
    """Gradients that nobody keeps: what a run takes besides them and what an optimizer holds."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        for param in params:
            param.register_post_accumulate_grad_hook(_drop)

    def begin(self, loss_scale: float = 1.0) -> None:
        """Nothing is held."""

    def expect_step(self, lend: Lender | None = None) -> None:
        """None comes."""

    def finish(self, max_norm: float | None = None) -> Tensor:  # noqa: ARG002  (as all of them)
        """No gradients, no norm."""
        return torch.zeros(())

    def of(self, param: Tensor) -> Tensor | None:  # noqa: ARG002  (as all of them)
        """Gone."""
        return None


def _drop(param: Tensor) -> None:
    param.grad = None


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `open_run`."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--method", default="full", choices=["full", "lora", "qlora"])
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--documents", type=int, default=4, help=f"of {LENGTH} random tokens")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))  # noqa: S108


def open_run(arguments: argparse.Namespace, name: str, fast_bytes: int | None) -> Run:
    """Everything for steps on the model.

    Args:
        arguments: Those of `run_arguments`.
        name: Of the optimizer, or `NOTHING`.
        fast_bytes: For a paged one.
    """
    return_freed_memory()
    config = load_config(
        None,
        [
            f"model={arguments.model}",
            "data.train=none",
            "output.dir=none",
            f"training.method={arguments.method}",
            f"training.compute_dtype={arguments.dtype}",
        ],
    )
    model = attach_trained(open_base(config), config)
    vocabulary = model.decoder.config.vocabulary_size
    batches = _batch(arguments.documents, vocabulary), _batch(1, vocabulary)
    if name == NOTHING:
        parameters = list(model.parameters.values())
        return Run(model, None, Dropped([model.stand_ins.get(p, p) for p in parameters]), *batches)
    optimizer = make_optimizer(
        name,
        [dict(group) for group in weight_decay_groups(model.parameters.items(), 0.01)],
        fast_bytes=fast_bytes,
        directory=None if fast_bytes is None else arguments.directory,
        lr=1e-5,
    )
    return Run(model, optimizer, optimizer.accumulator(model.stand_ins), *batches)


def save(path: Path, record: dict[str, object]) -> None:
    """Write a result as JSON, with the number of cores and PyTorch's version."""
    machine = {"cores": os.cpu_count(), "torch": torch.__version__}
    path.write_text(json.dumps({**record, "machine": machine}, indent=2) + "\n")


def _batch(documents: int, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (documents * LENGTH,), generator=generator)
    rows = tuple(f"document {number}" for number in range(documents))
    return Batch(tokens, tokens.roll(-1), pack([LENGTH] * documents), rows)


def _moved_bytes(stats: PoolStats) -> int:
    return stats.paged_in_bytes + stats.paged_out_bytes


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _others_seconds() -> float:
    """What all cores did since the machine's start, less what this process did; proc(5)."""
    fields = [int(ticks) for ticks in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    user, nice, system, _idle, _waiting, irq, softirq, steal = fields
    all_of_them = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return all_of_them - time.process_time()

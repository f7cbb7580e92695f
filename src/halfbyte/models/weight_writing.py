"""Writing the weights of a model out of those of another, in bounded memory, every core busy.

Several threads read and convert, each a tensor of its own; one hashes and one writes what they
made, in order; one has the disk catch up. Memory holds the tensors in between, never the model:
the source lies over the pages of its files, which are given back as it goes.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import halfbyte.kernels  # noqa: F401  (registers the native bodies)
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_writer import SafetensorsWriter
from halfbyte.formats.shards import write_index
from halfbyte.models.quantization_plan import Item, Plan, Shard
from halfbyte.models.sources import Tensors
from halfbyte.models.threads import single_core_threads, threads
from halfbyte.storage.fingerprint import Fingerprint

Conversion = Callable[[Item], Mapping[str, Tensor]]
"""Makes the tensors to write for one of the source; called from several threads."""

# Tensors that are being converted, or whose results wait to be written.
MAX_BYTES_IN_FLIGHT = 160 << 20
# The disk is set to work each time this much has been written.
SYNC_EVERY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is, in bytes of the source."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Attributes:
        fingerprint: Of all tensors.
        nbytes: Of all tensors.
    """

    fingerprint: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class _InFlight:
    """One tensor of the source on its way."""

    name: str
    nbytes: int
    steps: tuple[Future[None], ...]


def write_weights(
    directory: Path,
    tensors: Tensors,
    plan: Plan,
    convert: Conversion,
    *,
    progress: Callable[[Progress], None] | None,
) -> Written:
    """Write all shards of the plan, and their index, into `directory`.

    Args:
        directory: Exists.
        tensors: What `convert` reads; pages are given back tensor by tensor.
        plan: What to write.
        convert: Gives the tensors that the plan announces for an item.
        progress: Called after each tensor.

    Raises:
        HalfbyteError: From `convert`.
        StorageError: The disk is full or faulty.
    """
    run = _Run(tensors, plan, convert, progress)
    with ExitStack() as stack:
        run.start(stack)
        for shard in plan.shards:
            with _open_writer(directory, shard) as writer:
                run.write(shard, writer)
    files = [SafetensorsFile.open(directory / shard.name) for shard in plan.shards]
    if len(files) > 1:
        write_index(directory, files)
    return Written(run.fingerprint.hexdigest(), run.bytes_written)


class _Run:
    """The threads and what passes between them."""

    def __init__(
        self,
        tensors: Tensors,
        plan: Plan,
        convert: Conversion,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.fingerprint = Fingerprint(
            sum(len(item.specs) + (item.late is not None) for item in plan.items)
        )
        self.bytes_written = 0
        self._tensors = tensors
        self._convert = convert
        self._progress = progress
        self._done = 0
        self._in_flight: deque[_InFlight] = deque()
        self._syncs: list[Future[None]] = []

    def start(self, stack: ExitStack) -> None:
        """Start the threads; they end with `stack`."""
        self._converting = stack.enter_context(single_core_threads())
        self._hashing, self._writing, self._syncing = (
            stack.enter_context(threads(1)) for _ in range(3)
        )

    def write(self, shard: Shard, writer: SafetensorsWriter) -> None:
        """All tensors of one file."""
        try:
            for item in shard.items:
                made = self._converting.submit(self._convert, item)
                steps = (
                    self._hashing.submit(self._hash, made),
                    self._writing.submit(self._write, made, writer),
                )
                self._in_flight.append(_InFlight(item.name, self._weight(item), steps))
                self._settle(MAX_BYTES_IN_FLIGHT)
            self._settle(0)
            for sync in self._syncs:  # the kernel reports a faulty disk only once
                sync.result()
        finally:
            # Nothing may write any more when the file is closed.
            for one in (*self._in_flight, _InFlight("", 0, tuple(self._syncs))):
                for step in one.steps:
                    if not step.cancel():
                        step.exception()
            self._syncs.clear()

    def _hash(self, made: Future[Mapping[str, Tensor]]) -> None:
        parts = made.result()
        for name in sorted(parts, key=str.encode):
            self.fingerprint.add(name, parts[name])

    def _write(self, made: Future[Mapping[str, Tensor]], writer: SafetensorsWriter) -> None:
        before = self.bytes_written // SYNC_EVERY_BYTES
        for name, tensor in made.result().items():
            writer.write(name, tensor)
            self.bytes_written += tensor.nbytes
        if self.bytes_written // SYNC_EVERY_BYTES != before:
            self._syncs.append(self._syncing.submit(writer.sync))

    def _weight(self, item: Item) -> int:
        """Memory that a tensor may take on its way: a compressed one is decoded to 16 bits."""
        decoded = 2 * math.prod(self._tensors.shapes[item.name])
        return max(self._tensors.size(item.name), item.nbytes, decoded)

    def _settle(self, allowed: int) -> None:
        """Wait until at most that many bytes are in flight."""
        while self._in_flight and sum(one.nbytes for one in self._in_flight) > allowed:
            oldest = self._in_flight[0]
            for step in oldest.steps:
                step.result()
            self._in_flight.popleft()
            self._tensors.release(oldest.name)
            self._done += self._tensors.size(oldest.name)
            if self._progress is not None:
                self._progress(Progress(self._done, self._tensors.num_bytes))


@contextmanager
def _open_writer(directory: Path, shard: Shard) -> Iterator[SafetensorsWriter]:
    specs = {name: spec for item in shard.items for name, spec in item.specs.items()}
    late = [item.late for item in shard.items if item.late is not None]
    metadata = {"format": "pt"}
    with SafetensorsWriter.open(directory / shard.name, specs, late=late, metadata=metadata) as w:
        yield w

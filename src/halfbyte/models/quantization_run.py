"""The work of quantizing a model, in bounded memory and with every core busy.

Several threads read and quantize, each a tensor of its own; one hashes and one writes what they
made, in order; one has the disk catch up. Memory holds the tensors in between, never the model:
the source lies over the pages of its files, which are given back as it goes.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import halfbyte.kernels  # noqa: F401  (registers the native bodies)
from halfbyte.formats.bitsandbytes_layout import to_bitsandbytes
from halfbyte.formats.checks import dtype_name, require_finite, require_float
from halfbyte.formats.error_report import ErrorReport, error_report
from halfbyte.formats.quantized_tensor import quantize
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_writer import SafetensorsWriter
from halfbyte.formats.shards import write_index
from halfbyte.models.quantization_plan import Item, Plan, Quantizer, Shard, kept_dtype
from halfbyte.models.sources import Source
from halfbyte.storage.fingerprint import Fingerprint

# Tensors that are being quantized, or whose results wait to be written.
MAX_BYTES_IN_FLIGHT = 160 << 20
# The disk is set to work each time this much has been written.
SYNC_EVERY_BYTES = 64 << 20
MAX_THREADS = 16
CHECKED_TOGETHER = 1 << 20


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
        reports: Errors of the quantized weights, if asked for.
    """

    fingerprint: str
    nbytes: int
    reports: tuple[ErrorReport, ...]


@dataclass(frozen=True, slots=True)
class _Made:
    """What one tensor of the source became."""

    parts: Mapping[str, Tensor]
    report: ErrorReport | None


@dataclass(frozen=True, slots=True)
class _InFlight:
    """One tensor of the source on its way."""

    name: str
    nbytes: int
    steps: tuple[Future[None], ...]


def write_weights(
    directory: Path,
    source: Source,
    plan: Plan,
    quantizer: Quantizer,
    *,
    with_report: bool,
    progress: Callable[[Progress], None] | None,
) -> Written:
    """Write all shards of the plan, and their index, into `directory`.

    Raises:
        FormatError: A tensor cannot be quantized, or holds a NaN or an infinity.
        StorageError: The disk is full or faulty.
    """
    run = _Run(source, plan, quantizer, with_report=with_report, progress=progress)
    with ExitStack() as stack:
        run.start(stack)
        for shard in plan.shards:
            with _open_writer(directory, shard) as writer:
                run.write(shard, writer)
    files = [SafetensorsFile.open(directory / shard.name) for shard in plan.shards]
    if len(files) > 1:
        write_index(directory, files)
    return Written(run.fingerprint.hexdigest(), run.bytes_written, tuple(run.reports))


class _Run:
    """The threads and what passes between them."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        quantizer: Quantizer,
        *,
        with_report: bool,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.fingerprint = Fingerprint(
            sum(len(item.specs) + (item.late is not None) for item in plan.items)
        )
        self.bytes_written = 0
        self.reports: list[ErrorReport] = []
        self._source = source
        self._quantizer = quantizer
        self._with_report = with_report
        self._progress = progress
        self._done = 0
        self._in_flight: deque[_InFlight] = deque()
        self._syncs: list[Future[None]] = []

    def start(self, stack: ExitStack) -> None:
        """Start the threads; they end with `stack`."""
        self._converting = stack.enter_context(_single_core_threads())
        self._hashing, self._writing, self._syncing = (
            stack.enter_context(_threads(1)) for _ in range(3)
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
                self._in_flight.append(_InFlight(item.name, self._weight(item.name), steps))
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

    def _convert(self, item: Item) -> _Made:
        """The tensors to write for one of the source."""
        tensor = self._source.tensors.read(item.name)
        require_float(tensor, item.name)
        dtype = kept_dtype(self._source)
        if not item.quantized:
            _require_finite(tensor, item.name)
            kept = tensor.to(dtype)
            if kept.dtype != tensor.dtype:  # float16 ends at 65504
                _require_finite(kept, f"{item.name} as {dtype_name(dtype)}")
            return _Made({item.name: kept}, None)
        quantized = quantize(
            tensor,
            self._quantizer.book,
            block_size=self._quantizer.block_size,
            double_quant=self._quantizer.double_quant,
            name=item.name,
        ).to(dtype=dtype)
        report = error_report(tensor, quantized, name=item.name) if self._with_report else None
        return _Made(to_bitsandbytes(item.name, quantized), report)

    def _hash(self, made: Future[_Made]) -> None:
        parts = made.result().parts
        for name in sorted(parts, key=str.encode):
            self.fingerprint.add(name, parts[name])

    def _write(self, made: Future[_Made], writer: SafetensorsWriter) -> None:
        result = made.result()
        if result.report is not None:
            self.reports.append(result.report)
        before = self.bytes_written // SYNC_EVERY_BYTES
        for name, tensor in result.parts.items():
            writer.write(name, tensor)
            self.bytes_written += tensor.nbytes
        if self.bytes_written // SYNC_EVERY_BYTES != before:
            self._syncs.append(self._syncing.submit(writer.sync))

    def _weight(self, name: str) -> int:
        """Memory that a tensor may take on its way: a compressed one is decoded to 16 bits."""
        tensors = self._source.tensors
        return max(tensors.size(name), 2 * math.prod(tensors.shapes[name]))

    def _settle(self, allowed: int) -> None:
        """Wait until at most that many bytes are in flight."""
        while self._in_flight and sum(one.nbytes for one in self._in_flight) > allowed:
            oldest = self._in_flight[0]
            for step in oldest.steps:
                step.result()
            self._in_flight.popleft()
            self._source.tensors.release(oldest.name)
            self._done += self._source.tensors.size(oldest.name)
            if self._progress is not None:
                self._progress(Progress(self._done, self._source.tensors.num_bytes))


def _require_finite(tensor: Tensor, name: str) -> None:
    """`require_finite` without intermediates of the tensor's size."""
    for chunk in tensor.view(-1).split(CHECKED_TOGETHER):
        if not torch.isfinite(chunk).all():
            require_finite(tensor, name)


@contextmanager
def _threads(
    count: int, initializer: Callable[[], None] | None = None
) -> Iterator[ThreadPoolExecutor]:
    """Threads that are gone at the end; after an exception, what they had not begun is dropped."""
    executor = ThreadPoolExecutor(count, initializer=initializer)
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _single_core_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch may use, in each of which torch uses one.

    Tensors in parallel need no barriers, which cost more than the work when the machine is busy,
    and every sum is taken in the same order whatever the number of cores.
    """
    allowed = torch.get_num_threads()
    count = min(allowed, MAX_THREADS)
    started = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        started.wait()

    with _threads(count, begin) as executor:
        for _ in range(count):
            executor.submit(os.getpid)  # a task for each starts each
        started.wait()
        torch.set_num_threads(allowed)  # for threads yet to come; those above keep one
        yield executor


@contextmanager
def _open_writer(directory: Path, shard: Shard) -> Iterator[SafetensorsWriter]:
    specs = {name: spec for item in shard.items for name, spec in item.specs.items()}
    late = [item.late for item in shard.items if item.late is not None]
    metadata = {"format": "pt"}
    with SafetensorsWriter.open(directory / shard.name, specs, late=late, metadata=metadata) as w:
        yield w

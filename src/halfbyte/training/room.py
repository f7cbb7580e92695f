"""The budget of a paged optimizer follows what micro-batches leave of the memory.

What a micro-batch takes is measured, not predicted: private bytes while it runs, but for those of
the pool and those that activations have left for the next ones. One of as many tokens or fewer
takes at most as much; a larger one at most in proportion, since part of it (gradients, chunks of
logits) does not grow. Before the first nothing is known, so the pool gives way altogether; it is
empty then.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from halfbyte.kernels.activations import usage
from halfbyte.memory.resident import PeakSampler
from halfbyte.optim.optimizer import StatefulOptimizer

_MARGIN = 1.1  # samples miss short peaks, and an allocator rounds up
_EVERYTHING = 2**60


def set_aside(optimizer: StatefulOptimizer) -> int:
    """Bytes that a micro-batch does not take: the pool's, and what activations have left."""
    return optimizer.resident_bytes + usage().kept


class Room:
    """Makes room for micro-batches, of whatever size, in front of a paged optimizer."""

    def __init__(self, optimizer: StatefulOptimizer, sampler: PeakSampler) -> None:
        """`sampler` leaves out what `set_aside` says."""
        self._optimizer = optimizer
        self._sampler = sampler
        self._seen: dict[int, int] = {}  # tokens -> the most bytes they took

    @contextmanager
    def around(self, num_tokens: int) -> Iterator[None]:
        """While a micro-batch of so many tokens runs.

        Raises:
            StorageError: The slow tier cannot take what must leave.
        """
        if not self._optimizer.paged:
            yield
            return
        self._optimizer.make_room(max(self.needed(num_tokens) - usage().kept, 0))
        before = self._sampler.reset_besides()
        yield
        taken = self._sampler.peak_besides - before
        self._seen[num_tokens] = max(taken, self._seen.get(num_tokens, 0))

    def needed(self, num_tokens: int) -> int:
        """Bytes to keep free for a micro-batch."""
        if not self._seen:
            return _EVERYTHING
        most_tokens = max(self._seen)
        bound = min((tokens for tokens in self._seen if tokens >= num_tokens), default=most_tokens)
        taken = max(taken for tokens, taken in self._seen.items() if tokens <= bound)
        return int(_MARGIN * taken * max(1.0, num_tokens / most_tokens))

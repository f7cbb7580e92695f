"""Places that every step passes whatever its size, and the peak of memory between them.

They are where the loss begins and ends, and where each gradient arrives. Between two of them memory
is a linear function of the tokens; the peak of a whole step is not, because it moves from one place
to another.
"""

from torch import Tensor

from halfbyte.layers.weights import Weight, WeightRef, WeightStore
from halfbyte.memory.resident import reset_peak, resident
from halfbyte.models.layout import layout_of
from halfbyte.training.methods import TrainedModel


class Places:
    """The peaks between the places of a step."""

    def __init__(self, start: int) -> None:
        self._start = start
        self.begin()

    def begin(self, *, one_pass: bool = False) -> None:
        """A step of any number of micro-batches begins, or something with one."""
        self._one_pass = one_pass
        self.peaks: dict[int, int] = {}
        self.kept = 0
        self._place = 0
        reset_peak()

    def pass_by(self) -> None:
        """The next place."""
        peak = resident().peak - self._start
        self.peaks[self._place] = max(peak, self.peaks.get(self._place, 0))
        self._place += 1
        reset_peak()

    def begin_loss(self) -> None:
        """The first place of a micro-batch: what has passed before counts to its forward.

        An evaluation asks for the head at every chunk; only the first is such a place.
        """
        if self._one_pass and self.kept:
            return
        self._place = 0
        self.kept = max(self.kept, resident().total - self._start)
        self.pass_by()


class WatchedStore:
    """A store that tells when the loss asks for the head's weight, and when it returns it."""

    def __init__(self, store: WeightStore, places: Places) -> None:
        self._store = store
        self._places = places

    @property
    def permanent(self) -> bool:
        """As the store."""
        return self._store.permanent

    def acquire(self, ref: WeightRef) -> Weight:
        """The weight; the loss begins."""
        self._places.begin_loss()
        return self._store.acquire(ref)

    def release(self, ref: WeightRef) -> None:
        """The loss is over."""
        self._store.release(ref)
        self._places.pass_by()

    def announce(self, layer: int) -> None:
        """As the store."""
        self._store.announce(layer)


def watch_gradients(model: TrainedModel, places: Places) -> None:
    """Pass a place wherever a gradient arrives."""
    leaves: list[object] = list(model.parameters.values())
    if model.store is not None:
        leaves += [model.store.acquire(ref) for ref in layout_of(model.decoder.config).refs()]
    for leaf in {id(leaf): leaf for leaf in leaves}.values():
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf.register_hook(lambda _grad: places.pass_by())

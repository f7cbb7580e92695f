"""What new factors may begin as an approximation of: weights, or errors of quantizing them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.adapters.spec import LoraSpec
from halfbyte.errors import ConfigError
from halfbyte.layers.linear import Linear
from halfbyte.layers.weights import as_tensor
from halfbyte.models.sources import Tensors, open_source

LARGEST_ERROR = 0.5
"""Of a quantized weight, relative to it. Every 4-bit codebook stays below a quarter of that;
weights that differ by more are not the same weights."""


class InitialMatrices:
    """The matrix of each layer, for the initialisations that want one.

    Layers are asked for one at a time. What is wrong with their originals is collected, so that
    all of it can be said at once.
    """

    def __init__(self, spec: LoraSpec, originals: Tensors | None) -> None:
        self._spec = spec
        self._originals = originals
        self._problems: list[str] = []

    @classmethod
    def open(cls, spec: LoraSpec, linears: Sequence[Linear]) -> "InitialMatrices":
        """Open `init_weights` if the initialisation wants them.

        Raises:
            ConfigError: They are not given, or given in vain, or not those of such layers.
            MissingFileError, FormatError, UnsupportedError: They cannot be opened.
        """
        if (spec.init == "loftq") != (spec.init_weights is not None):
            raise ConfigError(
                f"lora.init {spec.init} and lora.init_weights {spec.init_weights}: loftq with "
                "init_weights expected, or neither",
                hint="init_weights is the model that the base was quantized from.",
            )
        if spec.init_weights is None:
            return cls(spec, None)
        originals = open_source(spec.init_weights).tensors
        problems = [
            f"{name}: shape {list(linear.weight.shape)} expected, found "
            f"{list(originals.shapes[name]) if name in originals.shapes else 'nothing'}"
            for linear in linears
            if originals.shapes.get(name := linear.weight.name) != linear.weight.shape
        ]
        if problems:
            raise ConfigError(f"lora.init_weights {spec.init_weights}", problems=problems)
        return cls(spec, originals)

    def of(self, linear: Linear) -> Tensor | None:
        """float32 `[O, I]`, or None where factors are drawn at random."""
        if self._spec.init not in {"pissa", "loftq"}:
            return None
        ref = linear.weight
        weight = as_tensor(linear.store.acquire(ref), torch.float32)
        try:
            return weight if self._originals is None else self._error(ref.name, weight)
        finally:
            linear.store.release(ref)

    def _error(self, name: str, weight: Tensor) -> Tensor:
        assert self._originals is not None  # noqa: S101  (the caller checked)
        original = self._originals.read(name).float()
        error = original - weight
        size = float(error.norm() / original.norm())
        if not 0 < size < LARGEST_ERROR:
            self._problems.append(f"{name}: differs from the base by {size:.1%}")
        self._originals.release(name)
        return error

    def require_originals(self) -> None:
        """Raise if a layer's original was not what its weight was quantized from.

        Raises:
            ConfigError: One is the weight itself, so that there is no error to begin with, or
                another weight altogether.
        """
        if self._problems:
            raise ConfigError(
                f"lora.init_weights {self._spec.init_weights}: what the base was quantized from "
                f"expected, which differs by more than 0 and less than {LARGEST_ERROR:.0%}",
                problems=self._problems,
            )

"""Weights that are trained themselves: float32 masters behind working copies.

Products run on the working copy in the compute dtype; its gradient is added to the master's in
float32 as soon as the backward has it, and freed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.kernels.activations import activation
from halfbyte.layers.weights import Weight, WeightRef, as_tensor


class TrainableStore:
    """A store for the method `full`.

    Attributes:
        masters: float32 weights by name, with their float32 gradients in `.grad`.
    """

    permanent = False

    def __init__(self, weights: Mapping[str, Weight], compute_dtype: torch.dtype) -> None:
        self.masters: dict[str, Tensor] = {
            name: as_tensor(weight, torch.float32).clone().requires_grad_()
            for name, weight in weights.items()
        }
        self._working: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            # Vectors are used in float32 (norms) or cast where they are used (biases).
            if compute_dtype == torch.float32 or master.dim() == 1:
                self._working[name] = master
                continue
            copy = master.detach().to(compute_dtype).requires_grad_()
            copy.register_post_accumulate_grad_hook(_MoveGradient(master))
            self._working[name] = copy

    def acquire(self, ref: WeightRef) -> Weight:
        """The working copy."""
        return self._working[ref.name]

    def release(self, ref: WeightRef) -> None:
        """Working copies stay."""

    def announce(self, layer: int) -> None:
        """Nothing needs fetching."""

    @property
    def stand_ins(self) -> dict[Tensor, Tensor]:
        """Working copies that autograd sees in the place of their masters, by master."""
        pairs = ((master, self._working[name]) for name, master in self.masters.items())
        return {master: working for master, working in pairs if working is not master}

    def refresh(self) -> None:
        """Bring the working copies up to date, after every step of an optimizer."""
        with torch.no_grad():
            for name, working in self._working.items():
                if working is not self.masters[name]:
                    working.copy_(self.masters[name])


class _MoveGradient:
    """A hook that adds a working copy's gradient to its master's."""

    def __init__(self, master: Tensor) -> None:
        self._master = master

    def __call__(self, working: Tensor) -> None:
        if working.grad is None:
            return
        if self._master.grad is None:
            grad = activation(working.grad, working.grad.shape, torch.float32)
            self._master.grad = grad.copy_(working.grad)
        else:
            self._master.grad.add_(working.grad)
        working.grad = None

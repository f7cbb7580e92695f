"""The loss of a mix of adapters, and its gradient with respect to the weights of the mix.

The weights multiply the B of each adapter, so autograd goes from the loss through all layers to a
handful of numbers. That costs one forward and one backward for the exact gradient, however many
adapters there are; the base and the factors stay as they are.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from halfbyte.data.batch import Batch
from halfbyte.layers.lora import LoraFactors
from halfbyte.models.decoder import Decoder
from halfbyte.training.held_out import score_held_out
from halfbyte.training.step import batch_loss


class MixLoss:
    """Mean loss over the targets of some batches, in nats, as a function of N weights.

    Args:
        decoder: The adapters are in its banks. Its mixes are changed.
        names: The N adapters, in the order of their weights.
        batches: At least one target.
    """

    def __init__(self, decoder: Decoder, names: Sequence[str], batches: Sequence[Batch]) -> None:
        self.names = tuple(names)
        self._decoder = decoder
        self._batches = tuple(batches)
        self._num_targets = sum(batch.num_targets for batch in batches)

    def value(self, weights: Mapping[str, float]) -> float:
        """The loss of one mix; adapters that are not named weigh nothing."""
        self._decoder.mixes = (tuple((name, weight) for name, weight in weights.items() if weight),)
        return score_held_out(self._decoder, self._batches).loss

    def gradient(self, weights_N: Tensor) -> tuple[float, Tensor]:
        """The loss and its gradient `[N]`.

        Args:
            weights_N: float32.
        """
        self._decoder.mixes = (tuple((name, 1.0) for name in self.names),)
        leaf_N = weights_N.detach().clone().requires_grad_()
        factors = {path: dict(linear.bank) for path, linear in self._decoder.linears.items()}
        total = 0.0
        try:
            for batch in self._batches:
                self._weigh(factors, leaf_N)
                # Layers are recomputed in the backward: the search is to fit where generating does.
                loss = batch_loss(self._decoder, batch, recompute=len(self._decoder.layers))
                (loss / self._num_targets).backward()
                total += loss.item()
        finally:
            for path, bank in factors.items():
                self._decoder.linears[path].bank = bank
        assert leaf_N.grad is not None  # noqa: S101  (each adapter has a layer)
        return total / self._num_targets, leaf_N.grad

    def _weigh(self, factors: Mapping[str, Mapping[str, LoraFactors]], weights_N: Tensor) -> None:
        for path, bank in factors.items():
            self._decoder.linears[path].bank = {
                name: LoraFactors(
                    bank[name].a_RI, weights_N[index] * bank[name].b_OR, bank[name].scaling
                )
                for index, name in enumerate(self.names)
                if name in bank
            }

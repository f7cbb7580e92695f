"""One optimizer step: gradients over several micro-batches, checked before they are applied."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from halfbyte.data.batch import Batch
from halfbyte.data.parse import NO_TARGET
from halfbyte.kernels import activations
from halfbyte.layers.cross_entropy import linear_cross_entropy
from halfbyte.layers.lora import fold_seed
from halfbyte.models.decoder import Decoder
from halfbyte.optim.accumulators import Accumulator


@dataclass(frozen=True, slots=True)
class Gradients:
    """What is known of a step's gradients once its backward passes are over.

    Attributes:
        loss: Mean over all targets of the step, in nats.
        norm: Of all gradients together, before clipping.
        num_tokens: Of the step.
        num_targets: Of the step.
    """

    loss: float
    norm: float
    num_tokens: int
    num_targets: int

    @property
    def finite(self) -> bool:
        """Whether loss and norm are numbers: otherwise nothing may be applied."""
        return self.loss - self.loss == 0 and self.norm - self.norm == 0


def reusing_activations(
    parameters: Iterable[Tensor], *, least: int = activations.LEAST_BYTES
) -> AbstractContextManager[None]:
    """Keep the memory of activations for the next ones, beside what else arrives in a step.

    That is gradients of small parameters, which come from the heap, and the dense gradient of a
    table of embeddings, which PyTorch makes. Our optimizers let go of what is kept before they make
    state.

    Args:
        parameters: That are trained.
        least: Bytes of an activation from which on its memory is used again.
    """
    sizes = [4 * parameter.numel() for parameter in parameters]
    small = sum(size for size in sizes if size < least)
    return activations.reusing(least=least, beside=small + 2 * max(sizes, default=0))


def compute_gradients(
    decoder: Decoder,
    batches: Sequence[Batch],
    accumulator: Accumulator,
    *,
    recompute: int = 0,
    dropout_seed: int | None = None,
    loss_scale: float = 1.0,
    max_norm: float | None = None,
    around: Callable[[Batch], AbstractContextManager[object]] = nullcontext,
) -> Gradients:
    """Loss and gradients of one step over several micro-batches.

    The loss is the mean over target tokens of the whole step, not a mean of means, so the result
    does not depend on how the step was cut into micro-batches.

    Args:
        decoder: Its trained parts require gradients.
        batches: Micro-batches of the step; each has a target.
        accumulator: Where the gradients go; what it held is replaced.
        recompute: Layers that compute their activations again in the backward pass.
        dropout_seed: Of this step; each micro-batch gets its own from it.
        loss_scale: Applied to the loss and taken out of the gradients again.
        max_norm: Gradients are scaled down to it.
        around: A context for each micro-batch; may raise to abandon the step.
    """
    accumulator.begin(loss_scale)
    activations.end_loan()
    num_targets = sum(batch.num_targets for batch in batches)
    factor = loss_scale / num_targets
    total = 0.0
    for index, batch in enumerate(batches):
        seed = None if dropout_seed is None else fold_seed(dropout_seed, index)
        with around(batch):
            loss = batch_loss(decoder, batch, seed, recompute=recompute, grad_scale=factor)
            if index == len(batches) - 1:
                accumulator.expect_step(activations.GivenUp().lend)
            (loss * factor).backward()
            total += loss.item()
    norm = accumulator.finish(max_norm)
    num_tokens = sum(batch.num_tokens for batch in batches)
    return Gradients(total / num_targets, norm.item(), num_tokens, num_targets)


def batch_loss(
    decoder: Decoder,
    batch: Batch,
    dropout_seed: int | None = None,
    *,
    recompute: int = 0,
    grad_scale: float = 1.0,
) -> Tensor:
    """Sum of the losses of a batch's targets, a float32 scalar; logits only where needed."""
    rows = (batch.targets != NO_TARGET).nonzero()[:, 0]
    features_ND = decoder(
        batch.tokens,
        batch.segments,
        rows=rows,
        dropout_seed=dropout_seed,
        recompute=recompute,
    )
    return linear_cross_entropy(
        features_ND, batch.targets[rows], decoder.head, grad_scale=grad_scale
    )

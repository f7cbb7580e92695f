"""One optimizer step: gradients over several micro-batches, checked before they are applied."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.data.batch import Batch
from halfbyte.data.parse import NO_TARGET
from halfbyte.layers.cross_entropy import linear_cross_entropy
from halfbyte.layers.lora import fold_seed
from halfbyte.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Gradients:
    """What a step's backward passes left in `.grad`.

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


def compute_gradients(
    decoder: Decoder,
    batches: Sequence[Batch],
    parameters: Mapping[str, Tensor],
    *,
    recompute: int = 0,
    dropout_seed: int | None = None,
    loss_scale: float = 1.0,
    max_norm: float | None = None,
    between: Callable[[], None] | None = None,
) -> Gradients:
    """Loss and gradients of one step over several micro-batches.

    The loss is the mean over target tokens of the whole step, not a mean of means, so the result
    does not depend on how the step was cut into micro-batches.

    Args:
        decoder: Its trained parts require gradients.
        batches: Micro-batches of the step; each has a target.
        parameters: What is trained, by name; their gradients are replaced.
        recompute: Layers that compute their activations again in the backward pass.
        dropout_seed: Of this step; each micro-batch gets its own from it.
        loss_scale: Applied to the loss and taken out of the gradients again.
        max_norm: Gradients are scaled down to it.
        between: Called after each micro-batch; may raise to abandon the step.
    """
    tensors = list(parameters.values())
    for tensor in tensors:
        tensor.grad = None
    num_targets = sum(batch.num_targets for batch in batches)
    factor = loss_scale / num_targets
    total = 0.0
    for index, batch in enumerate(batches):
        seed = None if dropout_seed is None else fold_seed(dropout_seed, index)
        loss = batch_loss(decoder, batch, seed, recompute=recompute, grad_scale=factor)
        (loss * factor).backward()
        total += loss.item()
        if between is not None:
            between()
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    if loss_scale != 1.0:
        torch._foreach_mul_(gradients, 1 / loss_scale)
    norm = torch.nn.utils.clip_grad_norm_(tensors, float("inf") if max_norm is None else max_norm)
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

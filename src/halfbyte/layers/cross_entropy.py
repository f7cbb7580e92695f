"""Cross-entropy of a linear head, at chosen rows, without ever holding all logits.

The forward goes through the rows in chunks: logits, log-sum-exp, loss, and at once the gradient
of the chunk's input. So the largest intermediate is a chunk of logits, in the backward too.

Dimension key:
    N  rows with a target     C  rows of a chunk
    D  features               V  vocabulary
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.formats.checks import describe
from halfbyte.kernels.activations import activation, release
from halfbyte.kernels.cross_entropy import cross_entropy_
from halfbyte.layers.autograd import Context, apply
from halfbyte.layers.matmul import (
    add_weight_gradient,
    multiply,
    multiply_transposed,
    write_product,
)
from halfbyte.layers.weights import Weight, WeightRef, WeightStore

CHUNK_BYTES = 64 * 2**20
"""Of float32 logits at a time, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Head:
    """The linear layer that turns features into logits.

    Attributes:
        weight: Handle of the weight `[V, D]`; that of the embeddings when tied.
        store: Where it lives.
        softcap: Logits become `softcap * tanh(logit / softcap)`; None leaves them.
    """

    weight: WeightRef
    store: WeightStore
    softcap: float | None = None

    def logits(self, x_ND: Tensor) -> Tensor:
        """`[N, V]`, in the dtype of `x`. Not differentiable: training uses the loss."""
        weight = self.store.acquire(self.weight)
        try:
            logits = multiply(x_ND.detach(), _detached(weight))
        finally:
            self.store.release(self.weight)
        return logits if self.softcap is None else _capped(logits, self.softcap)


@dataclass(frozen=True, slots=True, eq=False)
class TargetScores:
    """How well targets were predicted.

    Attributes:
        losses: Negative log-likelihood in nats, float32 `[N]`.
        correct: Whether the target had the largest logit, bool `[N]`.
    """

    losses: Tensor
    correct: Tensor


def linear_cross_entropy(
    x_ND: Tensor,
    targets_N: Tensor,
    head: Head,
    *,
    grad_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum over rows of -log softmax(x Wᵀ)[target], a float32 scalar; softmax in float32.

    Gradients reach `x`, and the weight when its store hands it out as trainable.

    Args:
        x_ND: Rows that have a target, compute dtype.
        targets_N: int64 `[N]`, 0 to V - 1.
        head: The weight.
        grad_scale: What the caller will multiply the sum with before going backward. It changes
            no result, but float16 gradients are rounded after the scaling, not before.
        chunk_rows: C; by default as many as `CHUNK_BYTES` hold.

    Raises:
        UsageError: Shapes, dtype or a target do not fit.
    """
    _require_targets(x_ND, targets_N, head)
    rows = chunk_rows or default_chunk_rows(head.weight.shape[0])
    weight = head.store.acquire(head.weight)
    trainable = weight if isinstance(weight, Tensor) and weight.requires_grad else None
    try:
        return apply(
            _LinearCrossEntropy,
            x_ND,
            trainable,
            targets_N,
            _detached(weight),
            head.softcap,
            grad_scale,
            rows,
        )
    finally:
        release()  # the logits are gone: no room is kept for them from here on
        head.store.release(head.weight)


def score_targets(
    x_ND: Tensor, targets_N: Tensor, head: Head, *, chunk_rows: int | None = None
) -> TargetScores:
    """Loss and correctness of every row; for evaluation, without gradients.

    Raises:
        UsageError: As `linear_cross_entropy`.
    """
    _require_targets(x_ND, targets_N, head)
    vocabulary = head.weight.shape[0]
    rows = chunk_rows or default_chunk_rows(vocabulary)
    losses = torch.empty(len(targets_N), dtype=torch.float32, device=x_ND.device)
    correct = torch.empty(len(targets_N), dtype=torch.bool, device=x_ND.device)
    buffer = activation(x_ND, (min(rows, len(targets_N)), vocabulary), torch.float32)
    weight = _detached(head.store.acquire(head.weight))
    try:
        for chunk in _chunks(len(targets_N), rows):
            x_CD = x_ND[chunk].detach()
            logits_CV = buffer[: x_CD.shape[0]]
            write_product(logits_CV, x_CD, weight)
            if head.softcap is not None:
                logits_CV = _capped(logits_CV, head.softcap)
            correct[chunk] = logits_CV.argmax(dim=1) == targets_N[chunk]
            losses[chunk] = cross_entropy_(logits_CV, targets_N[chunk], 1.0)
    finally:
        head.store.release(head.weight)
    return TargetScores(losses, correct)


def default_chunk_rows(vocabulary: int) -> int:
    """C for a vocabulary: the rows that `CHUNK_BYTES` hold, at least one."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def rows_at_once(count: int, vocabulary: int) -> int:
    """Rows of the largest chunk of so many targets."""
    return max(len(range(c.start, c.stop)) for c in _chunks(count, default_chunk_rows(vocabulary)))


def _require_targets(x_ND: Tensor, targets_N: Tensor, head: Head) -> None:
    problems = []
    vocabulary, features = head.weight.shape
    if x_ND.dim() != 2 or x_ND.shape[1] != features:  # noqa: PLR2004
        problems.append(f"x: [N, {features}] expected, found {describe(x_ND)}")
    if targets_N.dtype != torch.int64 or tuple(targets_N.shape) != (x_ND.shape[0],):
        problems.append(f"targets: int64 [{x_ND.shape[0]}] expected, found {describe(targets_N)}")
    elif len(targets_N):
        low, high = (int(bound) for bound in targets_N.aminmax())
        if low < 0 or high >= vocabulary:
            problems.append(f"targets: 0 to {vocabulary - 1} expected, found {low} to {high}")
    if problems:
        raise UsageError("no loss can be computed", problems=problems)


def _detached(weight: Weight) -> Weight:
    return weight.detach() if isinstance(weight, Tensor) else weight


def _chunks(count: int, size: int) -> Iterator[slice]:
    """As few as there must be, of sizes as equal as can be: a short last one costs as much."""
    parts = -(-count // size)
    return (slice(count * i // parts, count * (i + 1) // parts) for i in range(parts))


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return logits.div_(softcap).tanh_().mul_(softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x_ND: Tensor,
        trainable: Tensor | None,
        targets_N: Tensor,
        weight_VD: Weight,
        softcap: float | None,
        grad_scale: float,
        chunk_rows: int,
    ) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_x = activation(x_ND, x_ND.shape) if wants_x else None
        grad_weight = None
        if wants_weight:
            grad_weight = activation(x_ND, weight_VD.shape, torch.float32).zero_()
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        # One buffer for all chunks: fresh memory costs as much as the exponentials.
        shape = (min(chunk_rows, len(targets_N)), weight_VD.shape[0])
        buffer = activation(x_ND, shape, torch.float32)
        for chunk in _chunks(len(targets_N), chunk_rows):
            x_CD = x_ND[chunk]
            logits_CV = buffer[: x_CD.shape[0]]
            write_product(logits_CV, x_CD, weight_VD)
            slope = None
            if softcap is not None:
                logits_CV = _capped(logits_CV, softcap)
                slope = 1 - (logits_CV / softcap).square_()
            total += cross_entropy_(logits_CV, targets_N[chunk], grad_scale).sum()
            if slope is not None:
                logits_CV.mul_(slope)
            if grad_x is not None:
                grad_x[chunk] = multiply_transposed(logits_CV, weight_VD, x_ND.dtype)
            if grad_weight is not None:
                add_weight_gradient(grad_weight, logits_CV, x_CD)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.kept = (grad_scale, None if trainable is None else trainable.dtype)
        return total

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        # A Python number, so that low-precision gradients are multiplied with it in float32.
        grad_scale, weight_dtype = ctx.kept
        factor = grad.item() / torch.tensor(grad_scale, dtype=grad.dtype).item()
        if factor != 1.0:  # the caller did otherwise than announced: each product is a copy
            grad_x, grad_weight = (None if g is None else g * factor for g in (grad_x, grad_weight))
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_dtype)
        return grad_x, grad_weight, None, None, None, None, None

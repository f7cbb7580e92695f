"""Where the gradients of a step add up: in `.grad`, or in pages beside the optimizer's state.

Both give the same bits: the same additions in the same order, norms of the same tensors, and the
same roundings when a loss scale is taken out or the norm is clipped.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError
from halfbyte.memory.pool import Pool

Lender = Callable[[int, int], int]


class Accumulator(Protocol):
    """The gradients of one step, over all its micro-batches."""

    def begin(self, loss_scale: float = 1.0) -> None:
        """Forget those of the last step. The losses to come are multiplied by `loss_scale`."""
        ...

    def expect_step(self, lend: Lender | None = None) -> None:
        """The next backward pass is the last before a step.

        Args:
            lend: How many bytes that this pass has given up may be used until the step has been
                taken, of so many wanted, if so many are left for the gradients of one tensor.
        """
        ...

    def finish(self, max_norm: float | None = None) -> Tensor:
        """Take the loss scale out and clip; the norm before clipping, a scalar."""
        ...

    def of(self, param: Tensor) -> Tensor | None:
        """A parameter's gradient; None if no backward pass gave one."""
        ...


class ResidentAccumulator:
    """Gradients in `.grad`, where PyTorch leaves them."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        """Of these parameters."""
        self._params = params
        self._loss_scale = 1.0

    def begin(self, loss_scale: float = 1.0) -> None:
        """Free those of the last step."""
        self._loss_scale = loss_scale
        for param in self._params:
            param.grad = None

    def expect_step(self, lend: Lender | None = None) -> None:
        """Nothing to prepare."""

    def finish(self, max_norm: float | None = None) -> Tensor:
        """As PyTorch's `clip_grad_norm_`."""
        gradients = [param.grad for param in self._params if param.grad is not None]
        if self._loss_scale != 1.0:
            torch._foreach_mul_(gradients, 1 / self._loss_scale)
        limit = float("inf") if max_norm is None else max_norm
        return torch.nn.utils.clip_grad_norm_(self._params, limit)

    def of(self, param: Tensor) -> Tensor | None:
        """Its `.grad`."""
        return param.grad


class PagedAccumulator:
    """Gradients in a pool, added there as soon as a backward pass has them, and freed.

    So `.grad` is None after a backward pass, and what clips must go through `finish`. A tensor
    that stands in for a parameter (a copy in another dtype) may be what autograd sees, if
    it leaves its gradient in the parameter's `.grad`.
    """

    def __init__(
        self, pool: Pool, items: Mapping[Tensor, int], leaves: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        """Watch parameters.

        Args:
            pool: Where the gradients go.
            items: Numbers of items with one field, by parameter.
            leaves: What autograd sees in the place of some parameters.
        """
        self._pool = pool
        self._items = dict(items)
        self._norms: dict[Tensor, Tensor] = {}  # of parameters that have a gradient
        self._loss_scale = 1.0
        self._clipping: Tensor | None = None
        self._step_is_next = False
        self._lend: Lender | None = None
        self._to_come = 0  # bytes of gradients
        self._largest = max((param.nbytes for param in self._items), default=0)
        leaves = leaves or {}
        this = weakref.ref(self)
        self._hooks = [
            leaves.get(param, param).register_post_accumulate_grad_hook(_Take(this, param))
            for param in self._items
        ]

    def close(self) -> None:
        """Leave gradients in `.grad` from here on."""
        for hook in self._hooks:
            hook.remove()

    def begin(self, loss_scale: float = 1.0) -> None:
        """Forget those of the last step; no page of them is written again."""
        self._loss_scale = loss_scale
        self._clipping = None
        self._step_is_next, self._lend = False, None
        self._norms.clear()
        for param in self._items:
            param.grad = None
        self._pool.forget(set(self._items.values()))
        self._pool.borrow(0)

    def expect_step(self, lend: Lender | None = None) -> None:
        """Fill what the backward pass leaves of the budget with what the step needs first."""
        self._step_is_next = True
        self._lend = lend
        self._to_come = sum(param.nbytes for param in self._items)
        self._pool.prefetch(leave=self._to_come)

    def take(self, param: Tensor) -> None:
        """Add `.grad` to the pages and free it.

        Raises:
            StorageError: Paging failed.
            UnsupportedError: It is sparse.
        """
        gradient, param.grad = param.grad, None
        if gradient is None:
            return
        if gradient.is_sparse:
            raise UnsupportedError(
                "a sparse gradient cannot be paged, a dense one expected",
                hint="torch.optim.SparseAdam takes sparse gradients.",
            )
        if self._step_is_next:
            self._to_come -= param.nbytes
            if self._lend is not None and (lacking := self._pool.lacking_bytes):
                # A tensor that is used twice has two gradients for a while.
                self._pool.borrow(self._lend(lacking, 2 * self._largest))
        flat = gradient.contiguous().view(-1)
        first = param not in self._norms
        for chunk in self._pool.update(self._items[param], replace=first):
            part = flat[chunk.begin : chunk.end]
            (page,) = chunk.values
            # A sum with zero would lose the sign of a zero.
            page.copy_(part if first else part.add_(page))
        if self._loss_scale != 1.0:
            flat.mul_(1 / self._loss_scale)
        # Here the gradient is whole and in memory: its norm needs no pages later.
        self._norms[param] = torch.linalg.vector_norm(flat)
        if self._step_is_next:
            self._pool.prefetch(leave=self._to_come)

    def finish(self, max_norm: float | None = None) -> Tensor:
        """The norm; loss scale and clipping are applied page by page, by the step."""
        norms = [self._norms[param] for param in self._items if param in self._norms]
        if not norms:
            return torch.tensor(0.0)
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        if max_norm is not None:
            self._clipping = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        return total

    def of(self, param: Tensor) -> Tensor | None:
        """A copy, as the step will see it."""
        if param not in self._norms:
            return None
        (flat,) = self._pool.read(self._items[param])
        return self.scaled(flat).view(param.shape)

    def has(self, param: Tensor) -> bool:
        """Whether a backward pass gave a gradient."""
        return param in self._norms

    def item(self, param: Tensor) -> int | None:
        """The number of its item; None if the parameter is not watched."""
        return self._items.get(param)

    def scaled(self, part: Tensor) -> Tensor:
        """Take the loss scale out of a part and clip it, in place, as `clip_grad_norm_` does."""
        if self._loss_scale != 1.0:
            part.mul_(1 / self._loss_scale)
        if self._clipping is not None:
            part.mul_(self._clipping)
        return part


class _Take:
    """A hook that hands a gradient over, while there is somebody to take it."""

    def __init__(self, owner: "weakref.ref[PagedAccumulator]", param: Tensor) -> None:
        self._owner = owner
        self._param = weakref.ref(param)

    def __call__(self, _: Tensor) -> None:
        owner, param = self._owner(), self._param()
        if owner is not None and param is not None:
            owner.take(param)

"""Linears by handle, in groups that share an input, with the adapters in their banks.

In training a group is one autograd node. It saves its input once, in the compute dtype, or what it
can be computed from again, and what adapters need that is as small as their rank; never a weight:
the backward asks the store again.

Dimension key:
    T  tokens, packed        I  input features
    R  adapter rank          O  output features
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.kernels.gemm import matmul, matmul_add_
from halfbyte.layers.autograd import Context, apply, apply_many
from halfbyte.layers.lora import (
    NO_ADAPTERS,
    LoraFactors,
    Routing,
    Term,
    add_updates,
    dropout_mask,
    find_terms,
    fold_seed,
)
from halfbyte.layers.matmul import bind, multiply, multiply_transposed
from halfbyte.layers.recipe import Recipe, Restore, saved_for
from halfbyte.layers.recompute import in_second_run
from halfbyte.layers.weights import WeightRef, WeightStore


class Linear:
    """`x Wᵀ + b` for a weight in a store, plus the low-rank updates in its bank.

    Attributes:
        path: Module path in the checkpoint, such as `model.layers.0.mlp.up_proj`.
        weight: Handle of the weight `[O, I]`, 4-bit or not.
        bias: Handle of the bias `[O]`, or None.
        store: Where both live.
        bank: Low-rank updates by adapter name.
        bound: The product with the weight, once a permanent store has handed it out.
    """

    __slots__ = ("bank", "bias", "bound", "path", "store", "weight")

    def __init__(
        self, path: str, weight: WeightRef, bias: WeightRef | None, store: WeightStore
    ) -> None:
        self.path = path
        self.weight = weight
        self.bias = bias
        self.store = store
        self.bank: dict[str, LoraFactors] = {}
        self.bound: Callable[[Tensor], Tensor] | None = None

    @property
    def in_features(self) -> int:
        """I."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """O."""
        return self.weight.shape[0]

    def attach(self, name: str, factors: LoraFactors) -> None:
        """Put an adapter's update into the bank.

        Raises:
            UsageError: The name is taken, or the factors do not fit.
        """
        problems = []
        if name in self.bank:
            problems.append(f"an adapter {name!r} is attached already")
        found = (factors.b_OR.shape[0], factors.a_RI.shape[1])
        if found != self.weight.shape:
            problems.append(f"shape {list(self.weight.shape)} expected, B A is {list(found)}")
        if problems:
            raise UsageError(f"cannot attach to {self.path}", problems=problems)
        self.bank[name] = factors

    def detach(self, name: str) -> LoraFactors:
        """Take an adapter's update out of the bank.

        Raises:
            UsageError: There is none of that name.
        """
        if name not in self.bank:
            raise UsageError(f"no adapter {name!r} is attached to {self.path}")
        return self.bank.pop(name)

    def __call__(
        self,
        x_TI: Tensor,
        routing: Routing = NO_ADAPTERS,
        recipe: Recipe | None = None,
        *,
        unread: bool = False,
    ) -> Tensor:
        """`[T, O]`; see `project`."""
        return project(x_TI, (self,), routing, recipe, unread=unread)[0]


def project(
    x_TI: Tensor,
    linears: Sequence[Linear],
    routing: Routing = NO_ADAPTERS,
    recipe: Recipe | None = None,
    *,
    unread: bool = False,
) -> tuple[Tensor, ...]:
    """Outputs `[T, O]` of linears that share an input, adapters included.

    Gradients reach `x`, the factors that want them, and weights that a store hands out as
    trainable. Dropout hits the input of trainable factors only and is the same for all linears of
    the group: it depends on the routing's seed and on the path of the first linear.

    Args:
        x_TI: Compute dtype.
        linears: All with `I` input features.
        routing: Which rows use which adapters.
        recipe: How the backward gets `x` again; without one, `x` is kept.
        unread: No backward reads the outputs: computed again, they are NaN and cost nothing.

    Raises:
        UsageError: Gradients are wanted while rows of the batch use different adapters, or both
            for a weight and for its adapters.
    """
    if torch.is_grad_enabled():
        terms = _training_terms(linears, routing)
        trainable = any(term.factors.trainable for term in terms)
        if any(_is_trainable(linear) for linear in linears):
            if terms:
                raise UsageError(
                    f"{linears[0].path}: both the weight and its adapters want training"
                )
            return tuple(
                _trainable_forward(x_TI, linear, recipe, unread=unread) for linear in linears
            )
        if x_TI.requires_grad or trainable:
            factors = [f for t in terms for f in (t.factors.a_RI, t.factors.b_OR)]
            group = Group(tuple(linears), tuple(terms), routing.dropout_seed, unread)
            return apply_many(_GroupProjection, x_TI, group, recipe, *factors)
    outputs = tuple(_forward(x_TI, linear) for linear in linears)
    for part in routing.routes:
        rows = slice(part.begin, part.end)
        found = find_terms([linear.bank for linear in linears], part.mix)
        add_updates(x_TI[rows], [y[rows] for y in outputs], found)
    return outputs


def _training_terms(linears: Sequence[Linear], routing: Routing) -> list[Term]:
    if not routing.routes:
        return []
    first = routing.routes[0]
    banks = [linear.bank for linear in linears]
    if len(routing.routes) == 1 and (first.begin, first.end) == (0, routing.num_tokens):
        return find_terms(banks, first.mix)
    terms = [term for part in routing.routes for term in find_terms(banks, part.mix)]
    if terms:
        raise UsageError(
            "gradients need one adapter mix for the whole batch",
            hint="Run under `torch.no_grad()`, or give each batch one mix.",
        )
    return []


def _forward(x_TI: Tensor, linear: Linear) -> Tensor:
    if linear.bound is not None:
        return linear.bound(x_TI)
    store, bias_ref = linear.store, linear.bias
    weight = store.acquire(linear.weight)
    bias = None if bias_ref is None else store.acquire(bias_ref)
    assert bias is None or isinstance(bias, Tensor)  # noqa: S101  (never in 4 bits)
    try:
        if store.permanent:
            linear.bound = bind(weight, bias)
        return multiply(x_TI, weight, None if bias is None else bias.to(x_TI.dtype))
    finally:
        store.release(linear.weight)
        if bias_ref is not None:
            store.release(bias_ref)


def _is_trainable(linear: Linear) -> bool:
    weight = linear.store.acquire(linear.weight)
    linear.store.release(linear.weight)
    return isinstance(weight, Tensor) and weight.requires_grad


def _unread_outputs(x_TI: Tensor, linear: Linear) -> Tensor:
    """`[T, O]` without memory."""
    return x_TI.new_full((), torch.nan).expand(x_TI.shape[0], linear.out_features)


def _trainable_forward(
    x_TI: Tensor, linear: Linear, recipe: Recipe | None, *, unread: bool
) -> Tensor:
    weight = linear.store.acquire(linear.weight)
    bias = None if linear.bias is None else linear.store.acquire(linear.bias)
    assert isinstance(weight, Tensor)  # noqa: S101  (checked by the caller)
    assert bias is None or isinstance(bias, Tensor)  # noqa: S101  (never in 4 bits)
    return apply(
        _TrainableProjection,
        x_TI,
        weight.to(x_TI.dtype),
        None if bias is None else bias.to(x_TI.dtype),
        recipe,
        _unread_outputs(x_TI, linear) if unread and in_second_run() else None,
    )


class _TrainableProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        recipe: Recipe | None,
        unread_TO: Tensor | None,
    ) -> Tensor:
        saved, ctx.kept = saved_for(x_TI, recipe)
        ctx.save_for_backward(weight_OI, *saved)
        return matmul(x_TI, weight_OI.T, bias_O) if unread_TO is None else unread_TO

    @staticmethod
    def backward(ctx: Context, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, *saved = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        return (
            matmul(grad_TO, weight_OI) if wants_x else None,
            matmul(grad_TO.T, ctx.kept(saved)) if wants_weight else None,
            grad_TO.sum(dim=0) if wants_bias else None,
            None,
            None,
        )


@dataclass(frozen=True, slots=True)
class Group:
    """What a group's node keeps besides tensors.

    Attributes:
        linears: They share an input.
        terms: Updates in use.
        dropout_seed: Of the step, or None.
        unread: As in `project`.
    """

    linears: tuple[Linear, ...]
    terms: tuple[Term, ...]
    dropout_seed: int | None
    unread: bool

    def dropout_of(self, term: Term) -> float:
        """Dropout of the term's input: frozen updates, and evaluation, have none."""
        return (
            term.factors.dropout
            if self.dropout_seed is not None and term.factors.trainable
            else 0.0
        )

    def bundles(self) -> dict[float, list[int]]:
        """Terms, by index, that see the same dropped input."""
        found: dict[float, list[int]] = {}
        for index, term in enumerate(self.terms):
            found.setdefault(self.dropout_of(term), []).append(index)
        return found

    def keep(self, like_T: Tensor, probability: float) -> Tensor | None:
        """Factor 0 or 1 / (1 - p) for each element of the input; None without dropout.

        Args:
            like_T: Has the rows, dtype and device of the input.
            probability: p.
        """
        if not probability or self.dropout_seed is None:
            return None
        shape = torch.Size((like_T.shape[0], self.linears[0].in_features))
        key = zlib.crc32(self.linears[0].path.encode())
        mask = dropout_mask(shape, probability, fold_seed(self.dropout_seed, key))
        return mask.to(like_T.device, like_T.dtype).mul_(1 / (1 - probability))


def _times(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


class _GroupProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x_TI: Tensor, group: Group, recipe: Recipe | None, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        dtype = x_TI.dtype
        left_out = group.unread and in_second_run()
        forward = _unread_outputs if left_out else _forward
        outputs = [forward(x_TI, linear) for linear in group.linears]
        hidden: dict[int, Tensor] = {}
        for probability, members in group.bundles().items():
            dropped = _times(x_TI, group.keep(x_TI, probability))
            stacked = torch.cat([factors[2 * i].to(dtype) for i in members])
            ranks = [factors[2 * i].shape[0] for i in members]
            for i, h_TR in zip(
                members, matmul(dropped, stacked.T).split(ranks, dim=1), strict=True
            ):
                hidden[i] = h_TR
                if not left_out:
                    term = group.terms[i]
                    b_OR = factors[2 * i + 1].to(dtype)
                    matmul_add_(outputs[term.output], h_TR, b_OR.T, alpha=term.scale)
        saved, restore = saved_for(x_TI, recipe)
        ctx.kept = group, restore
        # The input is needed for the gradient of A only.
        wanted: tuple[bool, ...] = ctx.needs_input_grad
        saved = saved if any(wanted[3::2]) else ()
        ctx.save_for_backward(*factors, *(hidden[i] for i in range(len(group.terms))), *saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group: Group
        restore: Restore
        group, restore = ctx.kept
        count = len(group.terms)
        saved = ctx.saved_tensors
        factors, hidden, saved = (
            saved[: 2 * count],
            saved[2 * count : 3 * count],
            saved[3 * count :],
        )
        wanted: tuple[bool, ...] = ctx.needs_input_grad[3:]
        x_TI = restore(saved) if saved else None
        grad_x = _base_gradient(group, grads) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = [None] * len(factors)
        for probability, members in group.bundles().items():
            grad_hidden = []
            for i in members:
                term = group.terms[i]
                grad_TO = grads[term.output]
                scale_b = factors[2 * i + 1].to(grad_TO.dtype) * term.scale
                grad_hidden.append(matmul(grad_TO, scale_b))
                if wanted[2 * i + 1]:
                    grad_b = matmul(grad_TO.T, hidden[i], dtype=torch.float32)
                    found[2 * i + 1] = grad_b.mul_(term.scale)
            stacked_grad = torch.cat(grad_hidden, dim=1)
            keep = group.keep(stacked_grad, probability)
            if x_TI is not None and any(wanted[2 * i] for i in members):
                grad_a = matmul(stacked_grad.T, _times(x_TI, keep), dtype=torch.float32)
                ranks = [factors[2 * i].shape[0] for i in members]
                for i, part in zip(members, grad_a.split(ranks), strict=True):
                    found[2 * i] = part if wanted[2 * i] else None
            if grad_x is not None:
                stacked = torch.cat([factors[2 * i].to(stacked_grad.dtype) for i in members])
                if keep is None:
                    matmul_add_(grad_x, stacked_grad, stacked)
                else:
                    grad_x.addcmul_(matmul(stacked_grad, stacked), keep)
        return grad_x, None, None, *found


def _base_gradient(group: Group, grads: Sequence[Tensor]) -> Tensor:
    """`[T, I]`: what reaches the shared input through the frozen weights."""
    total: Tensor | None = None
    for linear, grad_TO in zip(group.linears, grads, strict=True):
        weight = linear.store.acquire(linear.weight)
        try:
            part = multiply_transposed(grad_TO, weight)
        finally:
            linear.store.release(linear.weight)
        total = part if total is None else total.add_(part)
    assert total is not None  # noqa: S101  (a group has a linear)
    return total

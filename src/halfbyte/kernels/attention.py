"""Causal attention over packed documents: schemas, reference bodies, fake kernels.

Semantics, for query i of a segment and head h, which uses key-value head h // (H / G):
    s_j = scale * (q_i . k_j)                  for the keys j that i sees
    s_j = softcap * tanh(s_j / softcap)        with a softcap
    lse = log(sum_j exp(s_j))
    out = sum_j exp(s_j - lse) v_j
The last query of a segment is at its last key; i sees the key at its own place and `window - 1`
keys before that, or all before. Products are summed and exponentials taken in float32; each result
is rounded to the dtype once. Kernels sum in another order, and keep no [T, S] matrix; one that
multiplies bfloat16 numbers alone first rounds weights, and gradients of scores, to that dtype.

Dimension key:
    T  queries, packed        H  query heads
    S  keys, packed           G  key-value heads; H is a multiple of G
    B  segments               D  features of a head
"""

from itertools import pairwise

import torch
from torch import Tensor

_library = torch.library.Library("halfbyte", "FRAGMENT")
_CALL = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, int? window=None, float? softcap=None"
)
_library.define(f"attention(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor out, Tensor lse)")
_library.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_CALL}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
)


def attention_reference(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs `[T, H, D]` in the dtype of `q`, and float32 `[H, T]` log-sum-exps.

    Args:
        q_THD: Queries. Features of a head are consecutive, or a kernel copies.
        k_SGD: Keys, of the dtype of the queries.
        v_SGD: Values.
        cu_seqlens_q: int32 `[B + 1]`; segment b holds the queries from entry b to entry b + 1.
        cu_seqlens_k: int32 `[B + 1]`; the same for keys: no fewer than queries, segment by segment.
        scale: Multiplies query-key products.
        window: Keys that a query sees at most; None means all.
        softcap: Bound of the scores; None leaves them.
    """
    out, lse = torch.empty_like(q_THD), q_THD.new_empty(q_THD.shape[1::-1], dtype=torch.float32)
    for queries, keys in _segments(cu_seqlens_q, cu_seqlens_k):
        q, k, v = _widened(q_THD[queries], k_SGD[keys], v_SGD[keys])
        scores, _ = _scores(q, k, scale, window, softcap)
        lse[:, queries] = scores.logsumexp(dim=-1)
        weights = torch.exp(scores - lse[:, queries, None])
        out[queries] = (weights @ v).transpose(0, 1).to(q_THD.dtype)
    return out.contiguous(), lse


def attention_backward_reference(
    grad_THD: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k` and `v`, in their shapes and dtype, contiguous.

    Args:
        grad_THD: Gradient of the outputs.
        q_THD: As in the forward; so are the arguments that are not named here.
        k_SGD: As in the forward.
        v_SGD: As in the forward.
        out_THD: What the forward returned.
        lse_HT: What the forward returned.
        cu_seqlens_q: As in the forward.
        cu_seqlens_k: As in the forward.
        scale: As in the forward.
        window: As in the forward.
        softcap: As in the forward.
    """
    like = [x.new_zeros(x.shape) for x in (q_THD, k_SGD, v_SGD)]
    grad_q, grad_k, grad_v = like
    for queries, keys in _segments(cu_seqlens_q, cu_seqlens_k):
        q, k, v = _widened(q_THD[queries], k_SGD[keys], v_SGD[keys])
        grad, out, _ = _widened(grad_THD[queries], out_THD[queries], out_THD[queries])
        scores, slope = _scores(q, k, scale, window, softcap)
        weights = torch.exp(scores - lse_HT[:, queries, None])
        mean = (grad * out).sum(dim=-1, keepdim=True)
        grad_scores = weights * (grad @ v.mT - mean) * slope * scale
        grad_q[queries] = (grad_scores @ k).transpose(0, 1).to(q_THD.dtype)
        for target, wide in ((grad_k, grad_scores.mT @ q), (grad_v, weights.mT @ grad)):
            by_group = wide.unflatten(0, (k_SGD.shape[1], -1)).sum(dim=1)
            target[keys] = by_group.transpose(0, 1).to(target.dtype)
    return grad_q, grad_k, grad_v


def _segments(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    bounds = (pairwise(cu.tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
    return [(slice(*queries), slice(*keys)) for queries, keys in zip(*bounds, strict=True)]


def _widened(q_THD: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Heads first, float32, as many heads as `q` has."""
    heads = q_THD.shape[1]
    return tuple(
        x.float().transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)
        for x in (q_THD, *others)
    )


def _scores(
    q_HTD: Tensor, k_HSD: Tensor, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`[H, T, S]` scores of a segment, -infinity where hidden, and the slope of the softcap."""
    scores = q_HTD @ k_HSD.mT * scale
    slope = torch.ones_like(scores)
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh.square()
    num_queries, num_keys = scores.shape[1:]
    places = torch.arange(num_keys, device=scores.device)
    distance = places[num_keys - num_queries :, None] - places
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return scores.masked_fill(hidden, -torch.inf), slope


_library.impl("attention", attention_reference, "CompositeExplicitAutograd")
_library.impl("attention_backward", attention_backward_reference, "CompositeExplicitAutograd")

attention = torch.ops.halfbyte.attention.default
attention_backward = torch.ops.halfbyte.attention_backward.default


@torch.library.register_fake("halfbyte::attention")
def _(
    q_THD: Tensor,
    k_SGD: Tensor,  # noqa: ARG001
    v_SGD: Tensor,  # noqa: ARG001
    *_call: object,
    **_named: object,
) -> tuple[Tensor, Tensor]:
    out = q_THD.new_empty(q_THD.shape)
    return out, q_THD.new_empty(q_THD.shape[1::-1], dtype=torch.float32)


@torch.library.register_fake("halfbyte::attention_backward")
def _(
    grad_THD: Tensor,  # noqa: ARG001
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    *_call: object,
    **_named: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return q_THD.new_empty(q_THD.shape), k_SGD.new_empty(k_SGD.shape), v_SGD.new_empty(v_SGD.shape)

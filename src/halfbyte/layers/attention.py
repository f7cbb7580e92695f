"""Causal attention over packed segments, with grouped heads, windows and a ragged cache.

Two entrances: `packed_attention` when all keys are in the batch, `cached_attention` when earlier
keys are in a cache. On a CPU with native kernels both run those, elsewhere PyTorch's attention.

Dimension key:
    T  tokens, packed         H  query heads
    Q  queries of a segment   G  key-value heads; H is a multiple of G
    S  keys of a segment      D  features of a head
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels import backends
from halfbyte.kernels.attention import attention as kernel
from halfbyte.kernels.attention import attention_backward as kernel_backward
from halfbyte.kernels.decode import single_query_attention
from halfbyte.layers.autograd import Context, apply
from halfbyte.layers.rotary import Angles, rotate, rotate_
from halfbyte.layers.segments import Segments

QUERY_BLOCK = 1024
"""Queries handled together where a mask is needed: bounds the mask, and skips keys out of reach."""


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What differs between layers.

    Attributes:
        scale: Multiplies query-key products.
        window: A token sees itself and `window - 1` tokens before it; None means all.
        softcap: Scores become `softcap * tanh(score / softcap)`; None leaves them.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


def packed_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    segments: Segments,
    spec: AttentionSpec,
    angles: Angles | None = None,
) -> Tensor:
    """Attention of each segment over itself, `[T, H, D]`. Differentiable.

    Args:
        q_THD: Queries. With angles their memory is taken over: nobody may read them afterwards.
        k_TGD: Keys; as queries.
        v_TGD: Values.
        segments: Their boundaries.
        spec: Scale, window, softcap.
        angles: Cosine and sine, float32 `[T, 1, D / 2]` each, to turn queries and keys by first.
    """
    if _has_kernel(q_THD):
        cu_seqlens = segments.cu_seqlens_q
        return _by_kernel(q_THD, k_TGD, v_TGD, (cu_seqlens, cu_seqlens), spec, angles)
    if angles is not None:
        q_THD, k_TGD = rotate(q_THD, *angles), rotate(k_TGD, *angles)
    bounds = segments.bounds_q
    parts = [
        _segment_attention(
            q_THD[begin:end],
            k_TGD[begin:end].transpose(0, 1),
            v_TGD[begin:end].transpose(0, 1),
            spec,
        )
        for begin, end in pairwise(bounds)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def cached_attention(
    q_THD: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    segments: Segments,
    spec: AttentionSpec,
) -> Tensor:
    """Attention of each segment over its own sequence, the earlier part of it cached.

    Args:
        q_THD: Queries of the new tokens.
        keys: `[G, S, D]` a segment, the new tokens' last.
        values: As `keys`.
        segments: Their boundaries.
        spec: Scale, window, softcap.

    Returns:
        `[T, H, D]`.
    """
    bounds = segments.bounds_q
    parts = [
        _segment_attention(q_THD[begin:end], k, v, spec)
        for begin, end, k, v in zip(bounds[:-1], bounds[1:], keys, values, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _has_kernel(x: Tensor) -> bool:
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return x.device.type == "cpu" and x.dtype in floats and backends.native_in_use()


class _Attention(torch.autograd.Function):
    """Saves its inputs and output, and a number for each row of scores: not the scores."""

    @staticmethod
    def forward(
        ctx: Context,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGD: Tensor,
        bounds: tuple[Tensor, Tensor],
        spec: AttentionSpec,
        angles: Angles | None,
    ) -> Tensor:
        call = (*bounds, spec.scale, spec.window, spec.softcap)
        if angles is not None:
            rotate_(q_THD, *angles)
            rotate_(k_SGD, *angles)
        out_THD, lse_HT = kernel(q_THD, k_SGD, v_SGD, *call)
        ctx.save_for_backward(q_THD, k_SGD, v_SGD, out_THD, lse_HT)
        ctx.kept = call, angles
        return out_THD  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Context, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        call, angles = ctx.kept
        grad_q, grad_k, grad_v = kernel_backward(grad_THD, *ctx.saved_tensors, *call)
        if angles is not None:
            rotate_(grad_q, *angles, inverse=True)
            rotate_(grad_k, *angles, inverse=True)
        return grad_q, grad_k, grad_v, None, None, None


def _by_kernel(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    bounds: tuple[Tensor, Tensor],
    spec: AttentionSpec,
    angles: Angles | None = None,
) -> Tensor:
    """`[T, H, D]`; `bounds` are the `cu_seqlens` of queries and of keys."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_THD, k_SGD, v_SGD)):
        return apply(_Attention, q_THD, k_SGD, v_SGD, bounds, spec, angles)
    if angles is not None:
        rotate_(q_THD, *angles)
        rotate_(k_SGD, *angles)
    out_THD, _ = kernel(q_THD, k_SGD, v_SGD, *bounds, spec.scale, spec.window, spec.softcap)
    return out_THD  # type: ignore[no-any-return]


def _segment_attention(q_QHD: Tensor, k_GSD: Tensor, v_GSD: Tensor, spec: AttentionSpec) -> Tensor:
    """`[Q, H, D]`; the last query sees the last key."""
    num_queries, num_keys = q_QHD.shape[0], k_GSD.shape[1]
    if num_queries == 1:
        begin = 0 if spec.window is None else max(0, num_keys - spec.window)
        return _one_query(q_QHD, k_GSD[:, begin:], v_GSD[:, begin:], spec)
    if _has_kernel(q_QHD):
        counts = torch.tensor([[0, num_queries], [0, num_keys]], dtype=torch.int32)
        bounds = (counts[0], counts[1])
        return _by_kernel(q_QHD, k_GSD.transpose(0, 1), v_GSD.transpose(0, 1), bounds, spec)
    windowed = spec.window is not None and spec.window < num_keys
    if num_queries == num_keys and not windowed and spec.softcap is None:
        return _attend(q_QHD, k_GSD, v_GSD, None, spec)
    blocks = []
    offset = num_keys - num_queries
    for first in range(0, num_queries, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, num_queries)
        begin = 0
        if spec.window is not None:
            begin = max(0, offset + first - spec.window + 1)
        keys = torch.arange(begin, offset + last, device=q_QHD.device)
        distance = torch.arange(offset + first, offset + last, device=q_QHD.device)[:, None] - keys
        mask = distance >= 0
        if spec.window is not None:
            mask &= distance < spec.window
        reach = slice(begin, offset + last)
        blocks.append(_attend(q_QHD[first:last], k_GSD[:, reach], v_GSD[:, reach], mask, spec))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _attend(
    q_QHD: Tensor, k_GSD: Tensor, v_GSD: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """Masked attention; without a mask, causal from the first key on."""
    q_HQD = q_QHD.transpose(0, 1)
    if spec.softcap is not None:
        return _attend_capped(q_HQD, k_GSD, v_GSD, mask, spec.softcap, spec.scale)
    out = functional.scaled_dot_product_attention(
        q_HQD[None],
        k_GSD[None],
        v_GSD[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=spec.scale,
        enable_gqa=q_HQD.shape[0] != k_GSD.shape[0],
    )
    return out[0].transpose(0, 1)


def _attend_capped(
    q_HQD: Tensor, k_GSD: Tensor, v_GSD: Tensor, mask: Tensor | None, softcap: float, scale: float
) -> Tensor:
    repeats = q_HQD.shape[0] // k_GSD.shape[0]
    k_HSD, v_HSD = (x.repeat_interleave(repeats, dim=0) for x in (k_GSD, v_GSD))
    scores = (q_HQD @ k_HSD.mT).float() * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(dim=-1).to(q_HQD.dtype) @ v_HSD).transpose(0, 1)


def _one_query(q_1HD: Tensor, k_GSD: Tensor, v_GSD: Tensor, spec: AttentionSpec) -> Tensor:
    """The query heads of a group see the same keys, so they are queries of one head here."""
    _, num_heads, head_dim = q_1HD.shape
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q_1HD, k_GSD, v_GSD))
    if _has_kernel(q_1HD) and not wanted:
        q_HD = q_1HD[0].contiguous()
        return single_query_attention(q_HD, k_GSD, v_GSD, spec.scale, spec.softcap)[None]  # type: ignore[no-any-return]
    if spec.softcap is not None:
        mask = torch.ones(1, k_GSD.shape[1], dtype=torch.bool, device=q_1HD.device)
        return _attend(q_1HD, k_GSD, v_GSD, mask, spec)
    grouped = q_1HD.reshape(1, k_GSD.shape[0], -1, head_dim)
    out = functional.scaled_dot_product_attention(
        grouped, k_GSD[None], v_GSD[None], scale=spec.scale
    )
    return out.reshape(1, num_heads, head_dim)

"""The decoder of every family: packed tokens in, features out, weights by handle.

The same code trains, prefills and decodes. Tokens of all sequences stand in one flat row; nothing
is padded. The head is applied by whoever needs logits, at the rows that need them.

Dimension key:
    T  tokens, packed        N  chosen rows
    D  hidden features       H  query heads
    G  key-value heads       K  features of a head
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.errors import UsageError
from halfbyte.layers.activation import gated, gated_recipe
from halfbyte.layers.attention import AttentionSpec, cached_attention, packed_attention
from halfbyte.layers.cross_entropy import Head
from halfbyte.layers.linear import Linear, project
from halfbyte.layers.lora import BASE_ONLY, Mix, Routing, route
from halfbyte.layers.norm import Norm
from halfbyte.layers.recipe import Recipe
from halfbyte.layers.recompute import recomputed
from halfbyte.layers.rotary import Angles, RotarySpec, inverse_frequencies, rotary_table, rotate_
from halfbyte.layers.segments import Segments
from halfbyte.layers.weights import WeightRef, WeightStore
from halfbyte.models.config import ModelConfig
from halfbyte.models.layout import LayerRefs, LinearRefs, layout_of


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens, sequence by sequence."""

    def extend(
        self, layer: int, k_TGK: Tensor, v_TGK: Tensor, segments: Segments
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Append the new tokens' keys and values; all so far, `[G, S, K]` a segment."""
        ...


@dataclass(frozen=True, slots=True)
class Pass:
    """What all layers of one forward share.

    Attributes:
        segments: Boundaries of the sequences.
        angles: Cosine and sine for each kind of rotary embedding.
        routing: Which rows use which adapters.
        cache: Earlier keys and values, or None.
    """

    segments: Segments
    angles: dict[RotarySpec, Angles]
    routing: Routing
    cache: KeyValueCache | None


class DecoderLayer:
    """Attention and feed-forward layers, each around the residual stream."""

    def __init__(
        self, config: ModelConfig, index: int, refs: LayerRefs, store: WeightStore
    ) -> None:
        def linear(part: LinearRefs) -> Linear:
            return Linear(part.path, part.weight, part.bias, store)

        def norm(ref: WeightRef) -> Norm:
            return _norm(ref, store, config)

        def optional(ref: WeightRef | None) -> Norm | None:
            return None if ref is None else norm(ref)

        self.index = index
        self.head_dim = config.head_dim
        self.activation = config.activation
        self.rotary = config.rotary_of(index)
        self.attention = AttentionSpec(
            config.attention_scale, config.windows[index], config.attention_softcap
        )
        self.query, self.key, self.value = linear(refs.query), linear(refs.key), linear(refs.value)
        self.output = linear(refs.output)
        self.gate, self.up, self.down = linear(refs.gate), linear(refs.up), linear(refs.down)
        self.inputs = (self.query, self.key, self.value)
        self.gates = (self.gate, self.up)
        self.attention_norm, self.mlp_norm = norm(refs.attention_norm), norm(refs.mlp_norm)
        self.query_norm, self.key_norm = optional(refs.query_norm), optional(refs.key_norm)
        self.post_attention_norm = optional(refs.post_attention_norm)
        self.post_mlp_norm = optional(refs.post_mlp_norm)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order in which they are used."""
        return (*self.inputs, self.output, *self.gates, self.down)

    def __call__(self, x_TD: Tensor, shared: Pass) -> Tensor:
        """The residual stream after this layer, `[T, D]`."""
        again = self.attention_norm.recipe(x_TD)
        update = self._attend(self.attention_norm(x_TD), again, shared)
        if self.post_attention_norm is not None:
            update = self.post_attention_norm(update)
        x_TD, normal_TD = self.mlp_norm.after_adding(x_TD, update)
        routing = shared.routing
        gate, up = project(normal_TD, self.gates, routing, self.mlp_norm.recipe(x_TD))
        again = gated_recipe(gate, up, self.activation)
        # What is added to the stream is read by no backward, unless it is normalized first.
        unread = self.post_mlp_norm is None
        update = self.down(gated(gate, up, self.activation), routing, again, unread=unread)
        if self.post_mlp_norm is not None:
            update = self.post_mlp_norm(update)
        return x_TD + update

    def _attend(self, x_TD: Tensor, again: Recipe, shared: Pass) -> Tensor:
        num_tokens = x_TD.shape[0]
        q, k, v = project(x_TD, self.inputs, shared.routing, again)
        q_THK = q.view(num_tokens, -1, self.head_dim)
        k_TGK = k.view(num_tokens, -1, self.head_dim)
        v_TGK = v.view(num_tokens, -1, self.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            q_THK, k_TGK = self.query_norm(q_THK), self.key_norm(k_TGK)
        # Turned in place: projections and norms made queries and keys for us alone.
        angles = shared.angles[self.rotary]
        if shared.cache is None:
            mixed = packed_attention(q_THK, k_TGK, v_TGK, shared.segments, self.attention, angles)
        else:
            q_THK, k_TGK = rotate_(q_THK, *angles), rotate_(k_TGK, *angles)
            keys, values = shared.cache.extend(self.index, k_TGK, v_TGK, shared.segments)
            mixed = cached_attention(q_THK, keys, values, shared.segments, self.attention)
        return self.output(mixed.reshape(num_tokens, -1), shared.routing)


class Decoder:
    """A model of any family.

    Attributes:
        config: Its shape and constants.
        store: Where its weights live.
        compute_dtype: Dtype of the residual stream and of all products.
        layers: In order.
        head: Turns features into logits.
        linears: Those inside the layers, by module path: what adapters attach to.
        mixes: Adapter mixes used by calls that name none; `Segments.adapters` index them.
    """

    def __init__(
        self,
        config: ModelConfig,
        store: WeightStore,
        *,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        layout = layout_of(config)
        self.config = config
        self.store = store
        self.compute_dtype = compute_dtype
        self.layers = [
            DecoderLayer(config, index, refs, store) for index, refs in enumerate(layout.layers)
        ]
        self.last_norm = _norm(layout.last_norm, store, config)
        self.head = Head(layout.head, store, config.logit_softcap)
        self.linears = {linear.path: linear for layer in self.layers for linear in layer.linears}
        self.mixes: tuple[Mix, ...] = (BASE_ONLY,)
        self._embeddings = layout.embeddings
        specs = {layer.rotary for layer in self.layers}
        self._frequencies = {spec: inverse_frequencies(spec, config.head_dim) for spec in specs}

    def __call__(
        self,
        tokens_T: Tensor,
        segments: Segments,
        *,
        rows: Tensor | None = None,
        cache: KeyValueCache | None = None,
        mixes: Sequence[Mix] | None = None,
        dropout_seed: int | None = None,
        recompute: int = 0,
    ) -> Tensor:
        """Features before the head.

        Args:
            tokens_T: int64 `[T]`.
            segments: Their boundaries.
            rows: int64 `[N]`: the tokens whose features are wanted; all by default.
            cache: Earlier keys and values; extended by this call.
            mixes: Used in place of the decoder's own.
            dropout_seed: Seed of this step's adapter dropout; None turns it off.
            recompute: How many layers (the first ones) compute their activations again in the
                backward instead of keeping them.

        Returns:
            `[N, D]` or `[T, D]`, compute dtype, normalized: what `head` takes.

        Raises:
            UsageError: Tokens, segments, cache or the numbers do not fit.
        """
        self._require_fitting(tokens_T, segments, cache, recompute)
        shared = self.prepare(segments, cache=cache, mixes=mixes, dropout_seed=dropout_seed)
        x_TD = self.embed(tokens_T)
        for layer in self.layers:
            self.store.announce(layer.index + 1)
            if layer.index < recompute and torch.is_grad_enabled():
                # Dropout is a function of seeds, so there is no generator state to restore.
                x_TD = recomputed(partial(layer, shared=shared), x_TD)
            else:
                x_TD = layer(x_TD, shared)
            if x_TD.requires_grad and not self.store.permanent:
                x_TD.register_hook(_Announcement(self.store, layer.index - 1))
        return self.last_norm(x_TD if rows is None else x_TD[rows])

    def logits(self, tokens_T: Tensor, segments: Segments, *, rows: Tensor | None = None) -> Tensor:
        """Logits `[N, V]` at `rows`, or at all tokens, without gradients."""
        with torch.no_grad():
            return self.head.logits(self(tokens_T, segments, rows=rows))

    def prepare(
        self,
        segments: Segments,
        *,
        cache: KeyValueCache | None = None,
        mixes: Sequence[Mix] | None = None,
        dropout_seed: int | None = None,
    ) -> Pass:
        """What all layers share; for callers that run the layers themselves."""
        angles = {
            spec: rotary_table(frequencies, segments.positions, spec.attention_factor)
            for spec, frequencies in self._frequencies.items()
        }
        routing = route(segments, self.mixes if mixes is None else mixes, dropout_seed)
        return Pass(segments, angles, routing, cache)

    def embed(self, tokens_T: Tensor) -> Tensor:
        """What the first layer takes, `[T, D]`."""
        table = self.store.acquire(self._embeddings)
        assert isinstance(table, Tensor)  # noqa: S101  (opening refuses 4-bit embeddings)
        x_TD = functional.embedding(tokens_T, table).to(self.compute_dtype)
        self.store.release(self._embeddings)
        if not self.config.family.scaled_embeddings:
            return x_TD
        # The scale is rounded to the dtype first, as the family's reference code does.
        scale = torch.tensor(math.sqrt(self.config.hidden_size), dtype=self.compute_dtype)
        return x_TD * scale.to(x_TD.device)

    def _require_fitting(
        self, tokens_T: Tensor, segments: Segments, cache: KeyValueCache | None, recompute: int
    ) -> None:
        problems = []
        if tokens_T.dtype != torch.int64 or tuple(tokens_T.shape) != (segments.num_tokens,):
            problems.append(
                f"tokens: int64 [{segments.num_tokens}] expected, found "
                f"{tokens_T.dtype} {list(tokens_T.shape)}"
            )
        else:
            low, high = (int(bound) for bound in tokens_T.aminmax())
            if low < 0 or high >= self.config.vocabulary_size:
                problems.append(
                    f"tokens: 0 to {self.config.vocabulary_size - 1} expected, "
                    f"found {low} to {high}"
                )
        if segments.cached and cache is None:
            problems.append("segments continue earlier tokens, but there is no cache")
        if not 0 <= recompute <= len(self.layers):
            problems.append(f"recompute: 0 to {len(self.layers)} layers, found {recompute}")
        if problems:
            raise UsageError("the decoder cannot run", problems=problems)


@dataclass(frozen=True, slots=True)
class _Announcement:
    """A gradient hook: the layer before is wanted next."""

    store: WeightStore
    layer: int

    def __call__(self, _grad: Tensor) -> None:
        self.store.announce(self.layer)


def _norm(ref: WeightRef, store: WeightStore, config: ModelConfig) -> Norm:
    return Norm(ref, store, eps=config.norm_eps, plus_one=config.family.norm_plus_one)

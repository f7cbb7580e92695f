"""Keys and values of sequences of different lengths, each in buffers of its own.

Dimension key:
    T  tokens, packed        L  layers
    G  key-value heads       C  capacity of a sequence
    K  features of a head
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from halfbyte.layers.segments import Segments, pack
from halfbyte.models.config import ModelConfig

GROWTH = 2
"""Factor by which a full buffer grows, so that all copying together stays linear."""


class SequenceCache:
    """One sequence's keys and values.

    Attributes:
        length: Tokens stored in every layer.
    """

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype) -> None:
        shape = (2, config.num_layers, config.num_key_value_heads, max(1, capacity))
        self.length = 0
        self._buffer = torch.empty(*shape, config.head_dim, dtype=dtype)
        self._split()

    @property
    def capacity(self) -> int:
        """C: tokens that fit before the buffers grow."""
        return self._buffer.shape[3]

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in all."""
        if length <= self.capacity:
            return
        grown = max(length, GROWTH * self.capacity)
        old = self._buffer
        self._buffer = old.new_empty(*old.shape[:3], grown, old.shape[4])
        self._buffer[:, :, :, : self.length] = old[:, :, :, : self.length]
        self._split()

    def _split(self) -> None:
        # Views by layer, made once: indexing costs as much as a small kernel.
        self.keys = self._buffer[0].unbind()
        self.values = self._buffer[1].unbind()


class RaggedCache:
    """The cache of a batch of sequences, in the order of its segments.

    Use: `segments = cache.plan(counts)`, run the decoder with both, `cache.commit()`.
    """

    def __init__(self, sequences: Sequence[SequenceCache]) -> None:
        self.sequences = list(sequences)
        self._ends: list[int] = []

    def plan(self, counts: Sequence[int], adapters: tuple[int, ...] = ()) -> Segments:
        """Segments of the next forward, `counts[b]` new tokens of sequence b, and room for them."""
        past = [sequence.length for sequence in self.sequences]
        self._ends = [old + new for old, new in zip(past, counts, strict=True)]
        for sequence, end in zip(self.sequences, self._ends, strict=True):
            sequence.reserve(end)
        return pack(counts, past, adapters)

    def extend(
        self, layer: int, k_TGK: Tensor, v_TGK: Tensor, segments: Segments
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Store a layer's new keys and values; all so far, `[G, length, K]` a sequence."""
        keys, values = [], []
        bounds = zip(self.sequences, self._ends, pairwise(segments.bounds_q), strict=True)
        for sequence, end, (first, last) in bounds:
            k_GCK, v_GCK = sequence.keys[layer], sequence.values[layer]
            new = slice(sequence.length, end)
            k_GCK[:, new] = k_TGK[first:last].transpose(0, 1)
            v_GCK[:, new] = v_TGK[first:last].transpose(0, 1)
            keys.append(k_GCK[:, :end])
            values.append(v_GCK[:, :end])
        return keys, values

    def commit(self) -> None:
        """The forward is done: its tokens belong to the sequences."""
        for sequence, end in zip(self.sequences, self._ends, strict=True):
            sequence.length = end

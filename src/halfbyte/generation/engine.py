"""Continuing several sequences at once: prefill, then one token a sequence and step.

Prompts of different lengths stand in one flat row, unpadded; a sequence that ends leaves the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.generation.cache import RaggedCache, SequenceCache
from halfbyte.generation.sampling import Sampler, Sampling
from halfbyte.layers.lora import Mix
from halfbyte.models.decoder import Decoder

PREFILL_TOKENS = 2048
"""Prompt tokens that go through the decoder together."""

FIRST_CAPACITY = 512
"""New tokens for which a cache has room before it grows."""


@dataclass(frozen=True, slots=True)
class NewToken:
    """One step of one sequence.

    Attributes:
        sequence: Its index among the prompts.
        token: What was chosen.
        finish: `stop` for a stop token, `length` for the last token that may come, else None.
    """

    sequence: int
    token: int
    finish: str | None


@dataclass(slots=True)
class _Sequence:
    index: int
    pending: list[int]  # tokens that the decoder has not seen
    remaining: int  # tokens that may still come
    cache: SequenceCache
    sampler: Sampler
    mix: Mix


class Engine:
    """Sequences being continued.

    Args:
        decoder: The model.
        prompts: Token ids of each, at least one.
        max_new_tokens: At most so many for each; fewer where the context length ends.
        sampling: How tokens are chosen; each sequence draws by itself from the same seed.
        stop_ids: Tokens that end a sequence.
        mixes: For each prompt the adapters it uses. When empty, all use the decoder's first mix, as
            it is now.

    Raises:
        UsageError: A prompt is empty, too long, or holds ids that the model does not have.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: frozenset[int] = frozenset(),
        mixes: Sequence[Mix] = (),
    ) -> None:
        _require_prompts(decoder, prompts, max_new_tokens, mixes)
        self._decoder = decoder
        self._stop_ids = stop_ids
        config = decoder.config
        self._running = [
            _Sequence(
                index,
                list(prompt),
                min(max_new_tokens, config.max_positions - len(prompt)),
                SequenceCache(
                    config,
                    len(prompt) + min(max_new_tokens, FIRST_CAPACITY),
                    decoder.compute_dtype,
                ),
                Sampler(sampling, list(prompt), config.vocabulary_size),
                mixes[index] if mixes else decoder.mixes[0],
            )
            for index, prompt in enumerate(prompts)
        ]

    @property
    def running(self) -> bool:
        """Whether any sequence goes on."""
        return bool(self._running)

    def stop(self, sequence: int) -> None:
        """End a sequence, for example because its text holds a stop string."""
        self._running = [s for s in self._running if s.index != sequence]

    def step(self) -> list[NewToken]:
        """One token for every sequence that goes on; the first step reads the prompts."""
        with torch.no_grad():
            logits = self._advance()
            found = []
            for sequence, logits_V in zip(self._running, logits, strict=True):
                token = sequence.sampler.choose(logits_V)
                sequence.pending = [token]
                sequence.remaining -= 1
                finish = "length" if sequence.remaining == 0 else None
                finish = "stop" if token in self._stop_ids else finish
                found.append(NewToken(sequence.index, token, finish))
        ended = {new.sequence for new in found if new.finish}
        if ended:
            self._running = [s for s in self._running if s.index not in ended]
        return found

    def _advance(self) -> Sequence[Tensor]:
        """Feed all pending tokens; logits after the last of each sequence."""
        features = []
        waiting = list(self._running)
        while waiting:
            room = PREFILL_TOKENS
            batch: list[tuple[_Sequence, int]] = []
            while waiting and room:
                count = min(len(waiting[0].pending), room)
                batch.append((waiting[0], count))
                room -= count
                if count == len(waiting[0].pending):
                    waiting.pop(0)
                elif not room:
                    break
            features.append(self._feed(batch))
        return self._decoder.head.logits(
            features[0] if len(features) == 1 else torch.cat(features)
        ).unbind()

    def _feed(self, batch: Sequence[tuple[_Sequence, int]]) -> Tensor:
        """Run the next `count` pending tokens of each; features where nothing is left pending."""
        cache = RaggedCache([sequence.cache for sequence, _ in batch])
        mixes = list(dict.fromkeys(sequence.mix for sequence, _ in batch))
        indices = tuple(mixes.index(sequence.mix) for sequence, _ in batch)
        segments = cache.plan([count for _, count in batch], indices if any(indices) else ())
        tokens: list[int] = []
        rows = []
        for sequence, count in batch:
            tokens += sequence.pending[:count]
            sequence.pending = sequence.pending[count:]
            if not sequence.pending:
                rows.append(len(tokens) - 1)
        chosen = None if len(rows) == len(tokens) else torch.tensor(rows, dtype=torch.int64)
        features = self._decoder(
            torch.tensor(tokens), segments, rows=chosen, cache=cache, mixes=mixes
        )
        cache.commit()
        return features


def _require_prompts(
    decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, mixes: Sequence[Mix]
) -> None:
    config = decoder.config
    problems = []
    if not prompts:
        problems.append("at least one prompt expected, found none")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens: at least 1 expected, found {max_new_tokens}")
    if mixes and len(mixes) != len(prompts):
        problems.append(f"mixes: one a prompt expected ({len(prompts)}), found {len(mixes)}")
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < config.max_positions:
            problems.append(
                f"prompt {index}: 1 to {config.max_positions - 1} tokens expected, "
                f"found {len(prompt)}"
            )
        elif not all(0 <= token < config.vocabulary_size for token in prompt):
            problems.append(f"prompt {index}: ids below {config.vocabulary_size} expected")
    if problems:
        raise UsageError("nothing can be generated", problems=problems)

"""Held-out prompts continued by the model as it stands: what its loss looks like as text."""

from collections.abc import Iterator
from dataclasses import dataclass

from halfbyte.data.dataset import Dataset
from halfbyte.generation.engine import Engine
from halfbyte.generation.sampling import Sampling
from halfbyte.models.decoder import Decoder
from halfbyte.text.tokenizer import Tokenizer

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A held-out document, cut where its answer begins.

    Attributes:
        row: Where it came from, as in `train.jsonl:12`.
        prompt: Token ids.
        reference: Token ids of the answer in the data.
    """

    row: str
    prompt: tuple[int, ...]
    reference: tuple[int, ...]


class Samples:
    """Continues the same prompts at every evaluation.

    The most likely token is always taken: no generator of random numbers is touched, and a run
    that is resumed writes what an uninterrupted one does.
    """

    def __init__(
        self, held_out: Dataset, tokenizer: Tokenizer, *, count: int, max_new_tokens: int
    ) -> None:
        self._held_out = held_out
        self._tokenizer = tokenizer
        self._count = count
        self._max_new_tokens = max_new_tokens

    def generate(self, decoder: Decoder) -> list[dict[str, str]]:
        """One record a prompt: `row`, `prompt`, `reference` and the model's `text`."""
        chosen = choose_prompts(self._held_out, self._count, decoder.config.max_positions)
        if not chosen:
            return []
        continued = self._continue(decoder, chosen)
        decode = self._tokenizer.decode
        return [
            {
                "row": sample.row,
                # With its special tokens: this is what the model saw.
                "prompt": decode(sample.prompt, skip_special=False),
                "reference": decode(sample.reference),
                "text": decode(ids),
            }
            for sample, ids in zip(chosen, continued, strict=True)
        ]

    def _continue(self, decoder: Decoder, chosen: list[SamplePrompt]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in chosen]
        engine = Engine(
            decoder,
            [sample.prompt for sample in chosen],
            max_new_tokens=self._max_new_tokens,
            sampling=Sampling(),
            stop_ids=frozenset(decoder.config.eos_ids) | frozenset(self._tokenizer.eos_ids),
        )
        while engine.running:
            for new in engine.step():
                if new.finish != "stop":
                    found[new.sequence].append(new.token)
        return found


def choose_prompts(held_out: Dataset, count: int, max_positions: int) -> list[SamplePrompt]:
    """The first documents with different prompts, as many as there are up to `count`.

    Args:
        held_out: Where to take them.
        count: At most so many.
        max_positions: Of the model; longer prompts are left out.
    """
    found: list[SamplePrompt] = []
    seen: set[int] = set()
    for sample, digest in _prompts(held_out):
        if len(found) == count:
            break
        if digest not in seen and len(sample.prompt) < max_positions:
            seen.add(digest)
            found.append(sample)
    return found


def _prompts(held_out: Dataset) -> Iterator[tuple[SamplePrompt, int]]:
    store = held_out.store
    for document, number in enumerate(held_out.index):
        begin, end = int(store.starts[number]), int(store.ends[number])
        predicts = store.has_target[begin:end]
        first = int(predicts.argmax())
        if first == 0:  # loss from the start, as in running text: its first half is the prompt
            split, stop = begin + max((end - begin) // 2, 1), end
        else:
            split = begin + first + 1
            rest = predicts[first:]
            stop = end if rest[:-1].all() else split + int(rest.argmin())
        yield (
            SamplePrompt(
                str(held_out.origin(document)),
                tuple(store.tokens[begin:split].tolist()),
                tuple(store.tokens[split:stop].tolist()),
            ),
            int(store.prompt_digests[number]),
        )

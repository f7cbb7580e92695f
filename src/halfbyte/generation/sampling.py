"""Choosing the next token of one sequence from its logits.

Order: repetition penalty, temperature, top-k, top-p, min-p; then one draw. Each sequence has a
random generator of its own, so that what it says does not depend on its neighbours.

Dimension key:
    V  vocabulary
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Valid once built.

    Attributes:
        temperature: Divides the logits; 0 always takes the most likely token.
        top_k: Only the k most likely tokens; 0 means all.
        top_p: Only the most likely tokens whose probabilities reach p together.
        min_p: Only tokens at least min_p times as likely as the most likely one.
        repetition_penalty: Logits of tokens seen before are divided by it if positive, else
            multiplied; 1 leaves them.
        seed: Of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "temperature: at least 0": self.temperature >= 0,
            "top_k: at least 0": self.top_k >= 0,
            "top_p: above 0 and at most 1": 0 < self.top_p <= 1,
            "min_p: at least 0 and at most 1": 0 <= self.min_p <= 1,
            "repetition_penalty: above 0": 0 < self.repetition_penalty < float("inf"),
        }
        problems = [
            f"{rule} expected, found {getattr(self, rule.split(':')[0])}"
            for rule, holds in checks.items()
            if not holds
        ]
        if problems:
            raise UsageError("tokens cannot be sampled like this", problems=problems)


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        sampling: How.
        prompt: Tokens before the first choice, which the repetition penalty counts as seen.
        vocabulary: V.
    """

    def __init__(self, sampling: Sampling, prompt: list[int], vocabulary: int) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen[prompt] = True

    def choose(self, logits_V: Tensor) -> int:
        """The next token."""
        if self._seen is not None:
            logits_V = _penalized(logits_V, self._seen, self._sampling.repetition_penalty)
        greedy = self._sampling.temperature == 0
        token = int(logits_V.argmax()) if greedy else self._draw(logits_V)
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _draw(self, logits_V: Tensor) -> int:
        probabilities_V = token_probabilities(logits_V, self._sampling)
        return int(torch.multinomial(probabilities_V, 1, generator=self._generator))


def _penalized(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    logits_V = logits_V.float()
    scaled = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    return torch.where(seen_V, scaled, logits_V)


def token_probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """What each token is drawn with, float32 `[V]`, after temperature and truncation.

    Args:
        logits_V: Any floating dtype.
        sampling: Its temperature must not be 0.
    """
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    logits_V = logits_V.float()
    scaled_V = (logits_V - logits_V.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scaled_V):
        kth = scaled_V.topk(sampling.top_k).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < kth, -torch.inf)
    probabilities_V = scaled_V.softmax(dim=0)
    if sampling.top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
        # A token goes when those before it already reach p: the first one always stays.
        before_V = sorted_V.cumsum(dim=0) - sorted_V
        probabilities_V[order_V[before_V >= sampling.top_p]] = 0
    if sampling.min_p > 0:
        probabilities_V[probabilities_V < sampling.min_p * probabilities_V.max()] = 0
    return probabilities_V / probabilities_V.sum()

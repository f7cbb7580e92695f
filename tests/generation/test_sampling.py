"""Choosing tokens: against the warpers of transformers, and by hand."""

from typing import Any

import pytest
import torch

from halfbyte.errors import UsageError
from halfbyte.generation.sampling import Sampler, Sampling, token_probabilities

LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        (Sampling(temperature=0.7), ["TemperatureLogitsWarper(0.7)"]),
        (Sampling(temperature=1.0, top_k=7), ["TopKLogitsWarper(7)"]),
        (Sampling(temperature=1.0, top_k=99), []),
        (Sampling(temperature=1.0, top_p=0.6), ["TopPLogitsWarper(0.6)"]),
        (Sampling(temperature=1.0, top_p=1e-6), ["TopPLogitsWarper(1e-6)"]),
        (Sampling(temperature=1.0, min_p=0.1), ["MinPLogitsWarper(0.1)"]),
        (
            Sampling(temperature=1.5, top_k=20, top_p=0.8, min_p=0.2),
            [
                "TemperatureLogitsWarper(1.5)",
                "TopKLogitsWarper(20)",
                "TopPLogitsWarper(0.8)",
                "MinPLogitsWarper(0.2)",
            ],
        ),
    ],
    ids=str,
)
def test_probabilities_equal_those_of_transformers(sampling: Sampling, warpers: list[str]) -> None:
    process: Any = pytest.importorskip("transformers.generation.logits_process")
    scores = LOGITS[None]
    for call in warpers:
        name, _, argument = call.rstrip(")").partition("(")
        number = float(argument)
        scores = getattr(process, name)(int(number) if name == "TopKLogitsWarper" else number)(
            torch.zeros(1, 1, dtype=torch.long), scores
        )
    torch.testing.assert_close(token_probabilities(LOGITS, sampling), scores.softmax(-1)[0])


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_equals_that_of_transformers(penalty: float) -> None:
    process: Any = pytest.importorskip("transformers.generation.logits_process")
    seen = [3, 9, 9, 40]
    sampler = Sampler(Sampling(repetition_penalty=penalty), seen, len(LOGITS))
    for _ in range(6):
        scores = process.RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([seen]), LOGITS[None]
        )
        seen.append(sampler.choose(LOGITS))
        assert seen[-1] == int(scores.argmax())


def test_greedy_takes_the_most_likely_token() -> None:
    assert Sampler(Sampling(), [], len(LOGITS)).choose(LOGITS) == int(LOGITS.argmax())


def test_draws_follow_the_seed_and_the_probabilities() -> None:
    def draws(seed: int, count: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, top_k=4, seed=seed), [], len(LOGITS))
        return [sampler.choose(LOGITS) for _ in range(count)]

    assert draws(1, 40) == draws(1, 40)
    assert draws(1, 40) != draws(2, 40)
    found = torch.bincount(torch.tensor(draws(3, 4000)), minlength=len(LOGITS)) / 4000
    expected = token_probabilities(LOGITS, Sampling(temperature=1.0, top_k=4))
    # Four standard deviations of a frequency over 4000 draws.
    assert (found - expected).abs().max() < 4 * 0.5 / 4000**0.5


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    probabilities = token_probabilities(LOGITS, Sampling(temperature=1e-30))
    assert probabilities.argmax() == LOGITS.argmax()
    assert probabilities.isfinite().all()


def test_settings_that_mean_nothing_are_listed() -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(temperature=-1.0, top_k=-1, top_p=0.0, min_p=float("nan"), repetition_penalty=0.0)
    assert len(caught.value.problems) == 5
    assert "top_p: above 0 and at most 1 expected, found 0.0" in caught.value.problems

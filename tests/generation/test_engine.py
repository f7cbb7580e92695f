"""Cached decoding against recomputing, several prompts against one, growth of the cache."""

import pytest
import torch

from halfbyte.errors import UsageError
from halfbyte.generation import engine as engine_module
from halfbyte.generation.cache import RaggedCache, SequenceCache
from halfbyte.generation.engine import Engine
from halfbyte.generation.sampling import Sampling
from halfbyte.layers.lora import BASE_ONLY, LoraFactors, Mix
from halfbyte.layers.segments import pack
from halfbyte.models.decoder import Decoder
from tiny_models import SIZES, make_decoder, make_oracle, random_tokens

FAMILIES = ["llama", "mistral", "qwen2-windows", "qwen3", "gemma3"]


@pytest.mark.parametrize("case", FAMILIES)
def test_cached_features_equal_recomputed_ones(case: str) -> None:
    decoder = make_decoder(make_oracle(case))
    lengths = [17, 5, 30]
    documents = [random_tokens(n, seed) for seed, n in enumerate(lengths)]
    cache = RaggedCache([SequenceCache(decoder.config, 2, torch.float32) for _ in lengths])
    taken = [0, 0, 0]
    features: list[list[torch.Tensor]] = [[], [], []]
    with torch.no_grad():
        for counts in ([8, 1, 13], [1, 1, 1], [1, 2, 1], [7, 1, 15]):
            segments = cache.plan(counts)
            pieces = [d[t : t + c] for d, t, c in zip(documents, taken, counts, strict=True)]
            found = decoder(torch.cat(pieces), segments, cache=cache).split(counts)
            cache.commit()
            taken = [t + c for t, c in zip(taken, counts, strict=True)]
            for kept, part in zip(features, found, strict=True):
                kept.append(part)
        assert taken == lengths
        for document, kept in zip(documents, features, strict=True):
            whole = decoder(document, pack([len(document)]))
            # Products of other shapes, so sums in another order.
            torch.testing.assert_close(torch.cat(kept), whole, rtol=1e-4, atol=1e-4)


def run(decoder: Decoder, prompts: list[list[int]], **options: object) -> list[list[int]]:
    settings = {"max_new_tokens": 12, "sampling": Sampling()} | options
    engine = Engine(decoder, prompts, **settings)  # type: ignore[arg-type]
    found: list[list[int]] = [[] for _ in prompts]
    while engine.running:
        for new in engine.step():
            found[new.sequence].append(new.token)
    return found


PROMPTS = [random_tokens(n, seed).tolist() for seed, n in enumerate([9, 1, 20, 4])]


@pytest.mark.parametrize("case", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(case: str) -> None:
    oracle = make_oracle(case)
    decoder = make_decoder(oracle)
    found = run(decoder, PROMPTS)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        expected = oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert tokens == expected


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3)])
def test_a_batch_of_prompts_equals_each_alone(sampling: Sampling) -> None:
    decoder = make_decoder(make_oracle("qwen3"))
    together = run(decoder, PROMPTS, sampling=sampling)
    assert together == [run(decoder, [prompt], sampling=sampling)[0] for prompt in PROMPTS]


def test_prompts_longer_than_a_prefill_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(make_oracle("gemma3"))
    whole = run(decoder, PROMPTS)
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 7)
    assert run(decoder, PROMPTS) == whole


def test_stop_tokens_end_a_sequence_and_leave_the_others() -> None:
    decoder = make_decoder(make_oracle("llama"))
    free = run(decoder, PROMPTS)
    stop = free[0][3]
    engine = Engine(
        decoder,
        PROMPTS,
        max_new_tokens=12,
        sampling=Sampling(),
        stop_ids=frozenset({stop}),
    )
    finish: dict[int, str] = {}
    found: list[list[int]] = [[] for _ in PROMPTS]
    while engine.running:
        for new in engine.step():
            found[new.sequence].append(new.token)
            if new.finish:
                finish[new.sequence] = new.finish
    for tokens, before, index in zip(found, free, range(4), strict=True):
        length = before.index(stop) + 1 if stop in before else 12
        assert tokens == before[:length]
        assert finish[index] == ("stop" if stop in before else "length")


def test_the_context_length_ends_generation() -> None:
    decoder = make_decoder(make_oracle("llama"))
    limit = SIZES["max_position_embeddings"]
    prompt = random_tokens(limit - 3).tolist()
    assert len(run(decoder, [prompt], max_new_tokens=50)[0]) == 3


def test_every_prompt_has_its_own_adapter() -> None:
    decoder = make_decoder(make_oracle("llama"))
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        for linear in decoder.linears.values():
            a = torch.randn(3, linear.in_features, generator=generator) * 0.2
            b = torch.randn(linear.out_features, 3, generator=generator) * 0.2
            linear.attach(name, LoraFactors(a, b, 1.0))
    a, both = (("a", 1.0),), (("a", 0.5), ("b", 0.5))
    mixes: list[Mix] = [both, BASE_ONLY, a, a]
    together = run(decoder, PROMPTS, mixes=mixes)
    alone = [
        run(decoder, [prompt], mixes=[mix])[0] for prompt, mix in zip(PROMPTS, mixes, strict=True)
    ]
    assert together == alone
    assert len({tuple(run(decoder, PROMPTS[:1], mixes=[mix])[0]) for mix in mixes}) == 3


def test_a_cache_grows_by_factors() -> None:
    config = make_decoder(make_oracle("llama")).config
    cache = SequenceCache(config, 4, torch.float32)
    cache.keys[1][:, :4] = 7.0
    cache.length = 4
    sizes = {cache.capacity}
    for length in range(5, 100):
        cache.reserve(length)
        sizes.add(cache.capacity)
    assert sizes == {4, 8, 16, 32, 64, 128}
    assert (cache.keys[1][:, :4] == 7).all()


def test_prompts_that_fit_nothing_are_listed() -> None:
    decoder = make_decoder(make_oracle("llama"))
    with pytest.raises(UsageError) as caught:
        Engine(
            decoder,
            [[], [1] * 64, [131]],
            max_new_tokens=0,
            sampling=Sampling(),
            mixes=[BASE_ONLY],
        )
    assert len(caught.value.problems) == 5
    with pytest.raises(UsageError, match="at least one prompt"):
        Engine(decoder, [], max_new_tokens=1, sampling=Sampling())

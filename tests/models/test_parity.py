"""Logits of every family against transformers, packing against nothing packed."""

import pytest
import torch

from halfbyte.layers.segments import pack
from tiny_models import CASES, make_decoder, make_oracle, random_tokens

LENGTHS = [19, 1, 33, 8]


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str) -> None:
    oracle = make_oracle(case)
    decoder = make_decoder(oracle)
    tokens = random_tokens(40)
    with torch.no_grad():
        expected = oracle(tokens[None]).logits[0]
    found = decoder.logits(tokens, pack([40]))
    # float32 on both sides: the requirement is 1e-4 of the range of the logits.
    assert (found - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_equal_the_same_documents_alone(case: str) -> None:
    decoder = make_decoder(make_oracle(case))
    documents = [random_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
    packed = decoder.logits(torch.cat(documents), pack(LENGTHS)).split(LENGTHS)
    for document, together in zip(documents, packed, strict=True):
        alone = decoder.logits(document, pack([len(document)]))
        # Only the shapes of the products differ, and with them the order of summation.
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_bfloat16_logits_are_as_close_to_float32_as_those_of_transformers(case: str) -> None:
    tokens = random_tokens(40)
    exact = make_oracle(case)
    rounded = make_oracle(case, torch.bfloat16)
    with torch.no_grad():
        expected = exact(tokens[None]).logits[0]
        theirs = rounded(tokens[None]).logits[0].float() - expected
    decoder = make_decoder(rounded, torch.bfloat16)
    ours = decoder.logits(tokens, pack([40])).float() - expected
    # The same roundings in a different order: errors of one size. Rounding to bfloat16 has unit
    # 2^-8; that the errors are that small in absolute terms shows that it is nothing but rounding.
    assert ours.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt()
    assert ours.square().mean().sqrt() <= 2**-4 * expected.std()


def test_only_chosen_rows_get_logits() -> None:
    decoder = make_decoder(make_oracle("llama"))
    tokens, rows = random_tokens(20), torch.tensor([3, 19])
    chosen = decoder.logits(tokens, pack([20]), rows=rows)
    torch.testing.assert_close(chosen, decoder.logits(tokens, pack([20]))[rows])

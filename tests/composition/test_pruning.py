"""TIES and DARE on the products of the factors, with PEFT's dense functions as the oracle."""

import pytest
import torch

from composition.random_adapters import random_update, relative_error
from halfbyte.composition.evaluate import evaluate_layer
from halfbyte.composition.factored import from_update
from halfbyte.composition.parser import parse
from halfbyte.composition.pruning import dare, ties

merge_utils = pytest.importorskip("peft.utils.merge_utils")

SHAPE = (40, 56)
UPDATES = {
    name: from_update(random_update(seed, SHAPE, rank, 8.0))
    for seed, (name, rank) in enumerate([("a", 4), ("b", 8), ("c", 6)])
}
DELTAS = {name: update.dense() for name, update in UPDATES.items()}


@pytest.mark.parametrize("density", [0.0001, 0.2, 0.5, 0.999])
def test_ties_is_that_of_peft(density: float) -> None:
    k = int(density * DELTAS["a"].numel())
    if k == 0:  # PEFT keeps nothing then; we keep the largest element
        density = 1.5 / DELTAS["a"].numel()
    theirs = merge_utils.ties(list(DELTAS.values()), torch.ones(3), density)
    ours = ties(list(UPDATES.values()), density)
    # The mean is a sum of at most three terms in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_ties_of_everything_is_a_mean_by_sign() -> None:
    first, second = torch.tensor([[1.0, -2.0, 0.0, 3.0]]), torch.tensor([[3.0, 1.0, 0.0, -3.0]])
    assert ties([first, second], 1.0).tolist() == [[2.0, -2.0, 0.0, 3.0]]
    assert ties([second, first], 1.0).tolist() == [[2.0, -2.0, 0.0, 3.0]]
    assert first.tolist() == [[1.0, -2.0, 0.0, 3.0]]


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.9, 0.9999999])
def test_dare_keeps_elements_or_drops_them(drop: float) -> None:
    big = torch.ones(512, 512)
    found = dare([(0, big)], drop, seed=1, path="layer")
    kept = found != 0
    scale = found.max()
    assert torch.equal(found, kept * scale)
    # The realised probability is a multiple of 2^-16, below 1.
    realised = min(round(drop * 2**16), 2**16 - 1) / 2**16
    assert scale.item() == pytest.approx(1 / (1 - realised), rel=1e-6)
    # Binomial, n = 2^18: five standard deviations.
    n = big.numel()
    assert abs(kept.sum().item() - n * (1 - realised)) <= 5 * (n * realised * (1 - realised)) ** 0.5


def test_dare_depends_on_seed_layer_and_place_only() -> None:
    a, b = UPDATES["a"], UPDATES["b"]
    first = dare([(0, a), (1, b)], 0.5, seed=1, path="x")
    assert torch.equal(first, dare([(0, a), (1, b)], 0.5, seed=1, path="x"))
    assert torch.equal(first, dare([(0, a)], 0.5, 1, "x") + dare([(1, b)], 0.5, 1, "x"))
    assert not torch.equal(first, dare([(0, a), (1, b)], 0.5, seed=2, path="x"))
    assert not torch.equal(first, dare([(0, a), (1, b)], 0.5, seed=1, path="y"))
    assert not torch.equal(dare([(0, a)], 0.5, 1, "x") != 0, dare([(1, a)], 0.5, 1, "x") != 0)


def test_the_result_has_the_rank_of_its_parts_and_says_what_that_lost() -> None:
    value = evaluate_layer(parse("ties(a, 2*b, c, density=0.5)", UPDATES), UPDATES, "layer")
    (cut,) = value.cuts
    expected = ties([DELTAS["a"], 2 * DELTAS["b"], DELTAS["c"]], 0.5)
    sigma = torch.linalg.svdvals(expected.double())
    assert cut.expression == "ties(a, 2.0*b, c, density=0.5)"
    assert cut.rank == value.update.rank == 18
    assert cut.energy == pytest.approx(expected.double().square().sum().item(), rel=1e-5)
    assert cut.dropped == pytest.approx(sigma[18:].square().sum().item(), rel=1e-4)
    error = relative_error(value.update.dense().double(), expected.double())
    assert error == pytest.approx((cut.dropped / cut.energy) ** 0.5, rel=1e-4)


def test_functions_nest_and_mix_with_sums() -> None:
    expression = "0.5*svd(dare(a, ties(b, c, density=0.5), drop=0.5, seed=3), rank=40) - a + c"
    value = evaluate_layer(parse(expression, UPDATES), UPDATES, "layer")
    inner = dare([(0, DELTAS["a"]), (1, ties([DELTAS["b"], DELTAS["c"]], 0.5))], 0.5, 3, "layer")
    expected = 0.5 * inner - DELTAS["a"] + DELTAS["c"]
    assert value.update.rank == 40 + 4 + 6
    # Rank 40 is all that a 40 x 56 matrix has.
    assert relative_error(value.update.dense(), expected) < 1e-5
    assert [cut.rank for cut in value.cuts] == [40]
    mixed = evaluate_layer(
        parse("svd(ties(a, b, density=1) + c - c, rank=40)", UPDATES), UPDATES, "l"
    )
    assert relative_error(mixed.update.dense(), ties([DELTAS["a"], DELTAS["b"]], 1.0)) < 1e-5


def test_adapters_without_the_layer_have_no_say() -> None:
    some = {name: UPDATES[name] for name in ("a", "b")}
    for expression, alone in (
        ("ties(a, b, c, density=0.5)", "ties(a, b, density=0.5)"),
        ("dare(a, b, c, drop=0.5, seed=1)", "dare(a, b, drop=0.5, seed=1)"),
    ):
        found = evaluate_layer(parse(expression, UPDATES), some, "layer").update.dense()
        assert torch.equal(found, evaluate_layer(parse(alone, some), some, "layer").update.dense())
    assert not evaluate_layer(parse("ties(c, density=0.5)", UPDATES), some, "layer").update.terms
    assert not evaluate_layer(parse("dare(c, drop=0.5)", UPDATES), some, "layer").update.terms

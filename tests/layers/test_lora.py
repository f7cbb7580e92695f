"""LoRA over 4-bit and 16-bit linears against dense autograd; dropout; mixes by segment."""

import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.errors import UsageError
from halfbyte.layers.linear import Linear, project
from halfbyte.layers.lora import (
    NO_ADAPTERS,
    LoraFactors,
    Mix,
    Routing,
    dropout_mask,
    fold_seed,
    route,
)
from halfbyte.layers.segments import pack
from halfbyte.layers.weights import ResidentStore, Weight, WeightRef, as_tensor

T, I = 13, 96  # noqa: E741
OUTPUTS = (40, 24, 24)
SCALING = 0.75


def normals(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_group(dtype: torch.dtype, *, four_bit: bool, bias: bool = False) -> list[Linear]:
    weights: dict[str, Weight] = {}
    group = []
    for index, outputs in enumerate(OUTPUTS):
        weight = normals(outputs, I, seed=index).mul(I**-0.5).to(dtype)
        weights[f"{index}.weight"] = hb.quantize(weight) if four_bit else weight
        weights[f"{index}.bias"] = normals(outputs, seed=50 + index).to(dtype)
        ref = WeightRef(f"{index}.bias", (outputs,)) if bias else None
        group.append(Linear(str(index), WeightRef(f"{index}.weight", (outputs, I)), ref, None))  # type: ignore[arg-type]
    store = ResidentStore(weights)
    for linear in group:
        linear.store = store
    return group


def factors_for(linear: Linear, rank: int, seed: int, dropout: float = 0.0) -> LoraFactors:
    a = normals(rank, linear.in_features, seed=seed).mul_(0.2)
    b = normals(linear.out_features, rank, seed=seed + 1).mul_(0.2)
    return LoraFactors(a, b, SCALING, dropout)


def whole(mix: Mix, dropout_seed: int | None = None) -> Routing:
    return route(pack([T]), [mix], dropout_seed)


def dense_weight(linear: Linear) -> Tensor:
    return as_tensor(linear.store.acquire(linear.weight), torch.float32).double()


# A product over I features, then one over the rank, each rounded to the dtype, and the sum: a
# handful of roundings of magnitudes that stay below 8 here.
TOLERANCE = {torch.float32: 8 * 2**-20, torch.bfloat16: 8 * 2**-7, torch.float16: 8 * 2**-10}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("adapted", [(0, 1, 2), (1,), ()], ids=["all", "one", "none"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_group_equals_dense_autograd(
    dtype: torch.dtype, four_bit: bool, adapted: tuple[int, ...], dropout: float
) -> None:
    group = make_group(dtype, four_bit=four_bit, bias=True)
    twins: dict[int, tuple[Tensor, Tensor]] = {}
    for index in adapted:
        factors = factors_for(group[index], 2 + index, 10 * index, dropout)
        factors.a_RI.requires_grad_()
        factors.b_OR.requires_grad_()
        group[index].attach("task", factors)
        twins[index] = (
            factors.a_RI.detach().double().requires_grad_(),
            factors.b_OR.detach().double().requires_grad_(),
        )
    x = normals(T, I, seed=77).to(dtype).requires_grad_()
    x_twin = x.detach().double().requires_grad_()
    outputs = project(x, group, whole((("task", 1.0),), dropout_seed=5))
    keep = torch.ones(T, I, dtype=torch.float64)
    if dropout:
        mask = dropout_mask(torch.Size((T, I)), dropout, fold_seed(5, zlib.crc32(b"0")))
        keep = mask.double() / (1 - dropout)
        assert 0.1 < (keep == 0).double().mean() < 0.4
    loss = x.new_zeros(())
    expected_loss = x_twin.new_zeros(())
    for index, linear in enumerate(group):
        expected = (
            x_twin @ dense_weight(linear).T
            + normals(OUTPUTS[index], seed=50 + index).to(dtype).double()
        )
        if index in twins:
            a, b = twins[index]
            expected = expected + SCALING * (x_twin * keep) @ a.T @ b.T
        assert (outputs[index].double() - expected).abs().max() <= TOLERANCE[dtype]
        upstream = normals(T, OUTPUTS[index], seed=90 + index).to(dtype)
        loss = loss + (outputs[index] * upstream).float().sum()
        expected_loss = expected_loss + (expected * upstream.double()).sum()
    loss.backward()
    expected_loss.backward()
    pairs = [(x.grad, x_twin.grad)]
    for index, (a, b) in twins.items():
        factors = group[index].bank["task"]
        assert factors.a_RI.grad is not None
        assert factors.a_RI.grad.dtype == torch.float32
        pairs += [(factors.a_RI.grad, a.grad), (factors.b_OR.grad, b.grad)]
    for found, wanted in pairs:
        assert found is not None
        assert wanted is not None
        size = max(1.0, wanted.abs().max().item() / 4)
        assert (found.double() - wanted).abs().max() <= size * TOLERANCE[dtype]


def saved_by(run: Callable[[], object]) -> list[Tensor]:
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return saved


def test_the_input_is_saved_once_and_no_weight_at_all() -> None:
    group = make_group(torch.bfloat16, four_bit=True)
    for index, linear in enumerate(group):
        factors = factors_for(linear, 4, index)
        factors.a_RI.requires_grad_()
        factors.b_OR.requires_grad_()
        linear.attach("task", factors)
    x = normals(T, I, seed=0).bfloat16().requires_grad_()
    outputs: list[Tensor] = []
    saved = saved_by(lambda: outputs.extend(project(x, group, whole((("task", 1.0),)))))
    inputs = [t for t in saved if t.shape == x.shape]
    assert len(inputs) == 1
    assert inputs[0].data_ptr() == x.data_ptr()
    factors_and_hidden = 4 * sum((I + o) * 4 for o in OUTPUTS) + 2 * T * 4 * len(OUTPUTS)
    assert sum(t.nbytes for t in saved) == x.nbytes + factors_and_hidden


def test_a_frozen_group_saves_nothing() -> None:
    group = make_group(torch.bfloat16, four_bit=True)
    x = normals(T, I, seed=0).bfloat16().requires_grad_()
    assert saved_by(lambda: project(x, group)) == []


def test_nothing_is_recorded_below_the_lowest_adapter() -> None:
    group = make_group(torch.float32, four_bit=True)
    x = normals(T, I, seed=0)
    assert all(y.grad_fn is None for y in project(x, group))
    factors = factors_for(group[0], 4, 0)
    factors.a_RI.requires_grad_()
    group[0].attach("task", factors)
    y = project(x, group, whole((("task", 1.0),)))[0]
    y.sum().backward()
    assert factors.a_RI.grad is not None
    assert factors.b_OR.grad is None
    assert x.grad is None


def test_a_frozen_adapter_under_a_trained_one_has_no_dropout_and_no_gradient() -> None:
    linear = make_group(torch.float32, four_bit=False)[0]
    below, above = factors_for(linear, 3, 1, 0.5), factors_for(linear, 2, 5, 0.5)
    linear.attach("below", below)
    linear.attach("above", above)
    above.a_RI.requires_grad_()
    above.b_OR.requires_grad_()
    x = normals(T, I, seed=3)
    with torch.no_grad():
        frozen = linear(x, whole((("below", 1.0),), dropout_seed=4))
        plain = linear(x)
        both = linear(x, whole((("below", 1.0), ("above", 2.0))))
        expected = plain + SCALING * (
            x @ below.a_RI.T @ below.b_OR.T + 2 * x @ above.a_RI.T @ above.b_OR.T
        )
    torch.testing.assert_close(frozen, plain + SCALING * x @ below.a_RI.T @ below.b_OR.T)
    torch.testing.assert_close(both, expected)
    linear(x, whole((("below", 1.0), ("above", 1.0)), dropout_seed=4)).sum().backward()
    assert below.a_RI.grad is None
    assert above.a_RI.grad is not None


def test_dropout_is_a_function_of_seed_and_place() -> None:
    shape = torch.Size((64, 33))
    mask = dropout_mask(shape, 0.1, 7)
    assert torch.equal(mask, dropout_mask(shape, 0.1, 7))
    assert not torch.equal(mask, dropout_mask(shape, 0.1, 8))
    assert fold_seed(1, 2) != fold_seed(2, 1)
    state = torch.random.get_rng_state()
    kept = dropout_mask(torch.Size((1000, 1000)), 0.3, 1).double().mean().item()
    # A million draws: the standard deviation of the mean is 0.00046.
    assert abs(kept - 0.7) < 0.003
    assert torch.equal(state, torch.random.get_rng_state())
    assert dropout_mask(shape, 0.0, 7).all()


def test_every_segment_has_its_own_mix() -> None:
    group = make_group(torch.float32, four_bit=True)
    for index, linear in enumerate(group[:2]):
        linear.attach("a", factors_for(linear, 3, index))
        linear.attach("b", factors_for(linear, 5, 20 + index))
    mixes: list[Mix] = [(), (("a", 1.0),), (("a", 0.5), ("b", -2.0)), (("absent", 1.0),)]
    counts, chosen = [3, 1, 4, 2, 3], (1, 0, 2, 3, 2)
    x = normals(sum(counts), I, seed=4)
    with torch.no_grad():
        together = project(x, group, route(pack(counts, adapters=chosen), mixes))
        begin = 0
        for count, mix in zip(counts, chosen, strict=True):
            rows = slice(begin, begin + count)
            alone = project(x[rows], group, route(pack([count]), [mixes[mix]]))
            for one, all_rows in zip(alone, together, strict=True):
                torch.testing.assert_close(all_rows[rows], one)
            begin += count


def test_neighbours_with_one_mix_are_joined() -> None:
    mixes: list[Mix] = [(), (("a", 1.0),)]
    routing = route(pack([1, 2, 3, 4], adapters=(1, 1, 0, 1)), mixes)
    assert [(r.begin, r.end) for r in routing.routes] == [(0, 3), (6, 10)]
    assert route(pack([1, 2]), [()]) is NO_ADAPTERS


def test_written_factors_are_cast_again() -> None:
    linear = make_group(torch.bfloat16, four_bit=False)[0]
    linear.attach("a", factors_for(linear, 3, 0))
    x = normals(T, I, seed=4).bfloat16()
    with torch.no_grad():
        before = linear(x, whole((("a", 1.0),)))
        linear.bank["a"].b_OR.zero_()
        assert torch.equal(linear(x, whole((("a", 1.0),))), linear(x))
        assert not torch.equal(before, linear(x))


def test_misuse_is_refused() -> None:
    linear, other, _ = make_group(torch.float32, four_bit=False)
    linear.attach("a", factors_for(linear, 3, 0))
    with pytest.raises(UsageError, match=r"(?s)2 problems.*attached already.*\[40, 96\] expected"):
        linear.attach("a", factors_for(other, 3, 0))
    with pytest.raises(UsageError, match="no adapter 'b'"):
        linear.detach("b")
    with pytest.raises(UsageError, match=r"0 to 0 expected, found \[1\]"):
        route(pack([2], adapters=(1,)), [(("a", 1.0),)])
    routing = route(pack([2, T - 2], adapters=(0, 1)), [(("a", 1.0),), ()])
    with pytest.raises(UsageError, match="one adapter mix for the whole batch"):
        linear(normals(T, I, seed=0).requires_grad_(), routing)
    with pytest.raises(UsageError, match=r"(?s)2 problems.*A: a float32 matrix.*dropout"):
        LoraFactors(torch.zeros(3), torch.zeros(4, 2), 1.0, 1.0)
    with pytest.raises(UsageError, match="ranks differ"):
        LoraFactors(torch.zeros(3, 4), torch.zeros(4, 2), 1.0)


def test_trainable_weights_get_gradients_and_take_no_adapters() -> None:
    linear = make_group(torch.float32, four_bit=False, bias=True)[0]
    weight, bias = (linear.store.acquire(ref) for ref in (linear.weight, linear.bias))  # type: ignore[arg-type]
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    weight.requires_grad_()
    bias.requires_grad_()
    x = normals(T, I, seed=0)
    linear(x).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.sum(0).expand_as(weight))
    assert bias.grad is not None
    linear.attach("a", factors_for(linear, 3, 0))
    with pytest.raises(UsageError, match="both the weight and its adapters"):
        linear(x, whole((("a", 1.0),)))

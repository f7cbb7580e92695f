"""Native attention, and the reference bodies, against float64 with bounds on every element."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import backends
from halfbyte.kernels.attention import (
    attention,
    attention_backward,
    attention_backward_reference,
    attention_reference,
)

ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDE = ROUNDOFF[torch.float32]
# These round weights, and gradients of scores, before they multiply them in that dtype.
ROUNDED_WEIGHTS = {("avx512bf16", torch.bfloat16)}


@dataclass(frozen=True)
class Case:
    """Lengths of the segments (queries and keys before them), heads, groups, features, the rest."""

    queries: list[int]
    past: list[int] | None = None
    heads: int = 6
    groups: int = 2
    features: int = 16
    scale: float = 0.3
    window: int | None = None
    softcap: float | None = None

    @property
    def keys(self) -> list[int]:
        past = self.past or [0] * len(self.queries)
        return [q + p for q, p in zip(self.queries, past, strict=True)]

    @property
    def call(self) -> tuple[Tensor, Tensor, float, int | None, float | None]:
        bounds = (cu_seqlens(self.queries), cu_seqlens(self.keys))
        return (*bounds, self.scale, self.window, self.softcap)

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Queries, keys, values and a gradient."""
        t, s = sum(self.queries), sum(self.keys)
        shapes = [(t, self.heads), (s, self.groups), (s, self.groups), (t, self.heads)]
        return [normals(*shape, self.features, seed=i).to(dtype) for i, shape in enumerate(shapes)]


CASES = [
    pytest.param(Case([1], heads=1, groups=1, features=1), id="one-of-each"),
    pytest.param(Case([1, 2, 1, 1], heads=9, groups=3, features=64), id="single-tokens"),
    pytest.param(Case([1, 7, 3, 12, 5] * 5, features=8), id="many-short"),
    pytest.param(Case([150, 31], heads=3, groups=1, features=64), id="several-blocks"),
    pytest.param(Case([65], heads=1, groups=1, features=80, scale=0.1), id="one-head"),
    pytest.param(Case([34, 33], heads=2, groups=2, features=96, scale=0.1), id="no-groups"),
    pytest.param(Case([70], heads=2, groups=1, features=256, scale=0.06), id="wide-heads"),
    pytest.param(Case([40], heads=7, groups=1, features=10), id="odd-heads-and-features"),
    pytest.param(Case([90], heads=3, groups=1, features=33), id="odd-features"),
    pytest.param(Case([3], heads=200, groups=2, features=12), id="more-heads-than-rows"),
    pytest.param(Case([130, 9], features=20, window=5), id="window-in-a-block"),
    pytest.param(Case([200], heads=4, groups=4, features=8, window=100), id="window-of-blocks"),
    pytest.param(Case([50], window=1), id="window-of-one"),
    pytest.param(Case([20, 9, 1], [100, 0, 3]), id="past"),
    pytest.param(Case([20, 9], [200, 64], window=70), id="past-and-window"),
    pytest.param(Case([80], scale=1.0, softcap=1.5), id="softcap"),
    pytest.param(Case([80], [40], scale=1.0, softcap=20.0, window=33), id="everything"),
]


def normals(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cu_seqlens(counts: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)


def visible(case: Case) -> Tensor:
    """Which keys each query sees, `[T, S]`."""
    blocks = []
    for num_queries, num_keys in zip(case.queries, case.keys, strict=True):
        distance = torch.arange(num_keys)[num_keys - num_queries :, None] - torch.arange(num_keys)
        window = num_keys if case.window is None else case.window
        blocks.append((distance >= 0) & (distance < window))
    return torch.block_diag(*blocks).bool()


def truth_and_bounds(
    case: Case, inputs: list[Tensor], dtype: torch.dtype, isa: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Output, log-sum-exp and three gradients by float64 autograd; how far float32 may be off.

    The bounds follow the arithmetic step by step with magnitudes in the place of values. A sum of n
    products is off by at most (n + 1) u of the sum of magnitudes, in any order; exp and tanh by a
    few u; a result in another dtype by one more rounding, of `out` twice: the backward reads it.
    """
    q, k, v, grad = (x.double() for x in inputs)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    repeats = case.heads // case.groups

    def by_head(x: Tensor) -> Tensor:
        return x.transpose(0, 1).repeat_interleave(case.heads // x.shape[1], dim=0)

    heads_q, heads_k, heads_v = (by_head(x) for x in leaves)
    scores = heads_q @ heads_k.mT * case.scale
    slope = torch.ones(())
    if case.softcap is not None:
        tanh = torch.tanh(scores / case.softcap)
        scores, slope = case.softcap * tanh, 1 - tanh.detach().square()
    scores = scores.masked_fill(~visible(case), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1)
    out = (weights @ heads_v).transpose(0, 1)
    out.backward(grad)
    values = [out.detach(), lse.detach(), *(x.grad for x in leaves if x.grad is not None)]

    few, u = 16 * WIDE, ROUNDOFF[dtype] if dtype != torch.float32 else 0.0
    weighted = ROUNDOFF[dtype] if (isa, dtype) in ROUNDED_WEIGHTS else 0.0
    num_keys, num_queries = max(case.keys), max(case.queries)
    a_q, a_k, a_v, a_grad = (by_head(x).abs() for x in (q, k, v, grad))
    p = weights.detach()
    # Scores are in powers of two: rounding the factor and their own size cost a little more.
    score = (case.features + 8) * WIDE * (a_q @ a_k.mT) * case.scale
    if case.softcap is not None:
        score = score + few * case.softcap
    score = score.masked_fill(~visible(case), 0)
    lse_bound = score.amax(-1) + (num_keys + 16) * WIDE + 4 * WIDE * lse.detach().abs()
    relative = score + lse_bound[..., None] + (num_keys + 16) * WIDE
    out_bound = (p * (relative + weighted)) @ a_v + u * by_head(values[0]).abs()
    mean = (a_grad * by_head(values[0]).abs()).sum(-1, keepdim=True)
    mean_bound = (a_grad * out_bound).sum(-1, keepdim=True) + case.features * WIDE * mean
    size = a_grad @ a_v.mT
    slope_bound = 0.0 if case.softcap is None else 2 * (score / case.softcap + few)
    one = p * ((relative + few + case.features * WIDE) * (size + mean) + mean_bound) * slope
    one = (one + p * (size + mean) * slope_bound) * case.scale
    summed = p * (size + mean) * slope * case.scale
    one = (1 + weighted) * one + weighted * summed

    def by_group(x: Tensor) -> Tensor:
        return x.unflatten(0, (case.groups, repeats)).sum(1).transpose(0, 1)

    rows = repeats * num_queries + 1
    bounds = [
        out_bound.transpose(0, 1),
        lse_bound,
        ((one + num_keys * WIDE * summed) @ a_k).transpose(0, 1) + u * values[2].abs(),
        by_group((one + rows * WIDE * summed).mT @ a_q) + u * values[3].abs(),
        by_group((p * (relative + weighted + rows * WIDE)).mT @ a_grad) + u * values[4].abs(),
    ]
    if dtype == torch.float16:  # its subnormals are rounded to a fixed unit
        bounds = [bound + 2**-25 for bound in bounds]
    return values, bounds


def check(
    case: Case,
    dtype: torch.dtype,
    isa: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    q, k, v, grad = inputs = case.inputs(dtype)
    truth, bounds = truth_and_bounds(case, inputs, dtype, isa)
    out, lse = forward(q, k, v, *case.call)
    found = [out, lse, *backward(grad, q, k, v, out, lse, *case.call)]
    names = ["out", "lse", "grad_q", "grad_k", "grad_v"]
    for name, ours, exact, bound in zip(names, found, truth, bounds, strict=True):
        assert ours.shape == exact.shape, name
        assert ours.dtype == (torch.float32 if name == "lse" else dtype), name
        assert ours.is_contiguous(), name
        assert ((ours.double() - exact).abs() <= bound).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_element_is_within_its_bound(case: Case, dtype: torch.dtype, isa: str) -> None:
    check(case, dtype, isa, attention, attention_backward)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_bodies_are_too(case: Case) -> None:
    check(case, torch.bfloat16, "reference", attention_reference, attention_backward_reference)


def run(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    q, k, v, grad = inputs
    out, lse = attention(q, k, v, *case.call)
    return [out, lse, *attention_backward(grad, q, k, v, out, lse, *case.call)]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [[300], [90, 200, 1, 90], [64] * 6], ids=str)
@pytest.mark.usefixtures("isa")
def test_threads_change_nothing(counts: list[int], dtype: torch.dtype) -> None:
    # From one document to many: as one task a head, cut into tasks of two kinds, and mixed.
    case = Case(counts, heads=3, groups=3, features=24)
    inputs = case.inputs(dtype)
    expected = run(case, inputs)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert_same_bits(run(case, inputs), expected)


@pytest.mark.usefixtures("isa")
def test_documents_beside_change_nothing() -> None:
    counts = [40, 130, 3]
    case = Case(counts, features=32)
    inputs = case.inputs(torch.bfloat16)
    together = run(case, inputs)
    for begin, count in zip(case.call[0].tolist(), counts, strict=False):
        part = slice(begin, begin + count)
        alone = run(Case([count], features=32), [x[part] for x in inputs])
        out, lse, *grads = together
        assert_same_bits(alone, [out[part], lse[:, part], *(x[part] for x in grads)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_later_tokens_change_nothing(dtype: torch.dtype) -> None:
    case = Case([100], features=32)
    q, k, v, _ = case.inputs(dtype)
    before, _ = attention(q, k, v, *case.call)
    for x in (q, k, v):
        x[77:] *= -3
    after, _ = attention(q, k, v, *case.call)
    assert torch.equal(after[:77], before[:77])
    assert not torch.equal(after[77:], before[77:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_what_is_not_finite_stays_in_its_document(dtype: torch.dtype) -> None:
    case = Case([21, 30, 20], heads=3, groups=1, features=32)
    inputs = case.inputs(dtype)
    clean = run(case, inputs)
    inputs[0][25, 0, 0], inputs[1][30, 0, 0], inputs[2][33, 0, 3] = torch.nan, torch.inf, torch.nan
    dirty = run(case, inputs)
    inside = slice(21, 51)
    for index, (a, b) in enumerate(zip(dirty, clean, strict=True)):
        by_token = (a.T, b.T) if index == 1 else (a, b)
        assert not by_token[0][inside].isfinite().all()
        for outside in (slice(21), slice(51, None)):
            assert torch.equal(by_token[0][outside], by_token[1][outside])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_large_scores_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    case = Case([90], heads=1, groups=1, features=4, scale=1.0)
    q, k, v = torch.full((90, 1, 4), 50.0), torch.zeros(90, 1, 4), normals(90, 1, 4, seed=3)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    k[10], k[20] = 50.0, -50.0  # scores of +10,000 and -10,000
    out, lse = attention(q, k, v, *case.call)
    assert torch.equal(out[10:], v[10].expand(80, 1, 4))
    assert torch.equal(lse[:, 10:], torch.full((1, 80), 1e4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_inputs_are_read_where_they_are(dtype: torch.dtype) -> None:
    case = Case([30, 41], heads=4, groups=2, features=24)
    q, k, v, grad = case.inputs(dtype)
    expected = run(case, [q, k, v, grad])
    joined = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)
    views = [x.unflatten(1, (-1, 24)) for x in joined.split([96, 48, 48], dim=1)]
    assert not views[1].is_contiguous()
    assert_same_bits(run(case, [*views, grad]), expected)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, grad)]
    assert_same_bits(run(case, heads_first), expected)
    features_first = [x.mT.contiguous().mT for x in (q, k, v, grad)]
    assert_same_bits(run(case, features_first), expected)


@pytest.mark.usefixtures("isa")
def test_a_gradient_without_memory_of_its_own() -> None:
    case = Case([30])
    q, k, v, _ = case.inputs()
    ones = torch.ones(()).expand(q.shape)  # what `sum().backward()` hands down
    assert_same_bits(run(case, [q, k, v, ones]), run(case, [q, k, v, ones.contiguous()]))


@pytest.mark.usefixtures("isa")
def test_no_tokens() -> None:
    for found in run(Case([0]), Case([0]).inputs()):
        assert found.numel() == 0
    past = Case([0, 2], [5, 0])
    *_, grad_k, grad_v = run(past, past.inputs())
    assert (grad_k[:5] == 0).all()
    assert (grad_v[:5] == 0).all()


def test_operators_are_sound() -> None:
    case = Case([3, 5], [2, 0], window=4, softcap=2.0)
    q, k, v, grad = case.inputs()
    torch.library.opcheck(attention, (q, k, v, *case.call))
    out, lse = attention(q, k, v, *case.call)
    torch.library.opcheck(attention_backward, (grad, q, k, v, out, lse, *case.call))


needs_native = pytest.mark.skipif(not backends.native_in_use(), reason="native kernels are absent")
GOOD = Case([3, 5], features=8)


def arguments() -> dict[str, object]:
    q, k, v, grad = GOOD.inputs()
    out, lse = attention(q, k, v, *GOOD.call)
    names = ("cu_seqlens_q", "cu_seqlens_k", "scale", "window", "softcap")
    tensors = {"grad": grad, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    return tensors | dict(zip(names, GOOD.call, strict=True))


@needs_native
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.zeros(8, 48), r"q: \[T, H, D\]"),
        ("q", torch.zeros(8, 6, 8, dtype=torch.float64), "q: .*float32, bfloat16 or float16"),
        ("q", torch.zeros(8, 6, 0), "features: at least 1"),
        ("q", torch.zeros(8, 0, 8), "heads: at least 1"),
        ("q", torch.zeros(8, 5, 8), "k: a number of heads that divides 5"),
        ("q", torch.zeros(9, 6, 8), "cu_seqlens_q: rising numbers from 0 to 9"),
        ("k", torch.zeros(8, 2), r"k: \[S, G, D\]"),
        ("k", torch.zeros(8, 0, 8), "k: a number of heads that divides 6"),
        ("k", torch.zeros(8, 2, 7), r"k: .*\[8, 2, 8\]"),
        ("k", torch.zeros(8, 2, 8, dtype=torch.float16), r"k: aligned Float \[8, 2, 8\]"),
        ("v", torch.zeros(7, 2, 8), r"v: aligned Float \[8, 2, 8\]"),
        ("grad", torch.zeros(8, 6, 7), r"grad: aligned Float \[8, 6, 8\]"),
        ("grad", torch.zeros(8, 6, 8).bfloat16(), r"grad: aligned Float \[8, 6, 8\]"),
        ("out", torch.zeros(7, 6, 8), r"out: aligned Float \[8, 6, 8\]"),
        ("lse", torch.zeros(6, 7), "lse: .* 48 elements"),
        ("lse", torch.zeros(8, 6).T, "lse: contiguous"),
        ("cu_seqlens_q", torch.tensor([0, 3, 8]), r"cu_seqlens_q: .*Int \[B \+ 1\]"),
        ("cu_seqlens_q", torch.tensor([0], dtype=torch.int32), r"cu_seqlens_q: .*Int \[B"),
        ("cu_seqlens_q", torch.tensor([0, 9, 8], dtype=torch.int32), "cu_seqlens_q: rising"),
        ("cu_seqlens_q", torch.tensor([1, 3, 8], dtype=torch.int32), "cu_seqlens_q: rising"),
        ("cu_seqlens_q", torch.tensor([0, 4, 8], dtype=torch.int32), "no fewer keys .* segment 0"),
        ("cu_seqlens_k", torch.tensor([0, 8], dtype=torch.int32), "cu_seqlens_k: 3 numbers"),
        ("cu_seqlens_k", torch.tensor([0, -3, 8], dtype=torch.int32), "cu_seqlens_k: rising"),
        ("scale", float("inf"), "scale: a finite number"),
        ("window", 0, "window: at least 1"),
        ("window", -(2**63), "window: at least 1"),
        ("softcap", 0.0, "softcap: a positive number"),
        ("softcap", float("nan"), "softcap: a positive number"),
        ("softcap", 1e-60, "softcap: a positive number"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: object, message: str) -> None:
    wrong = arguments() | {name: value}
    with pytest.raises(RuntimeError, match=message):
        attention_backward(*wrong.values())
    if name not in {"grad", "out", "lse"}:
        for only_backward in ("grad", "out", "lse"):
            del wrong[only_backward]
        with pytest.raises(RuntimeError, match=message):
            attention(*wrong.values())


@needs_native
def test_all_problems_are_in_one_message() -> None:
    wrong = arguments() | {"window": 0, "v": torch.zeros(1), "scale": float("nan")}
    with pytest.raises(RuntimeError, match=r"v: .*\n.*scale: .*\n.*window: "):
        attention_backward(*wrong.values())


@needs_native
@pytest.mark.parametrize("seed", range(4))
def test_random_arguments_never_crash(seed: int) -> None:
    generator = random.Random(seed)  # noqa: S311  (not for secrets)

    def random_bounds() -> Tensor:
        inside = sorted(generator.choice([0, 1, 3, 5, 8, 2**30]) for _ in range(2))
        numbers = generator.choice([[0, *inside, 8], inside, [0, -5, 8], [0, 8], []])
        return torch.tensor(numbers, dtype=generator.choice([torch.int32, torch.int64]))

    def random_tensor() -> Tensor:
        dtype = generator.choice([torch.float32] * 3 + [torch.bfloat16, torch.float64, torch.int32])
        shape = generator.choice(
            [(8, 6, 8), (8, 2, 8), (0, 6, 8), (8, 6, 0), (8, 1, 8), (6, 8), (8,), (), (8, 6, 8, 1)]
        )
        tensor = torch.ones(shape).to(dtype)
        if tensor.dim() and generator.random() < 0.3:
            turned = generator.random() < 0.5
            tensor = tensor.transpose(0, -1) if turned else tensor[:1].expand_as(tensor)
        return tensor.to("meta") if generator.random() < 0.05 else tensor

    accepted = 0
    for _ in range(200):
        wrong = arguments()
        for name in generator.sample(list(wrong), generator.randint(1, 3)):
            if name in {"scale", "softcap"}:
                wrong[name] = generator.choice([0.0, -1.0, 1e300, 1e-30, float("nan"), 1.0])
            elif name == "window":
                wrong[name] = generator.choice([None, 0, 1, 2, 2**31, 2**63 - 1, -(2**63)])
            elif name.startswith("cu"):
                wrong[name] = random_bounds()
            else:
                wrong[name] = random_tensor()
        try:
            attention_backward(*wrong.values())
            accepted += 1
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
            pass
    assert 0 < accepted < 150

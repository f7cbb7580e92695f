"""Few rows times a dense weight, and single queries, against float64 on every instruction set."""

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import backends
from halfbyte.kernels.decode import (
    linear_rows,
    linear_rows_reference,
    single_query_attention,
    single_query_attention_reference,
)
from halfbyte.kernels.gemm import matmul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def normals(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_product(ours: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """At most K + 16 roundings of each product of K, to the unit roundoff of float32, and one."""
    exact, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    summing = (x.shape[1] + 16) * 2**-24 * magnitude
    bound = summing + ROUNDOFF[ours.dtype] * (exact.abs() + summing)
    assert ours.shape == exact.shape
    assert torch.all((ours.double() - exact).abs() <= bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (33, 64), (50, 131), (3, 576)], ids=str)
def test_linear_rows(isa: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = normals(*shape, dtype=dtype), normals(shape[0], dtype=dtype)
    for rows in (1, 2, 3, 4, 5, 8, 11):
        x = normals(rows, shape[1], dtype=dtype)
        assert_product(linear_rows(x, weight), x, weight)
        assert_product(linear_rows(x, weight, bias), x, weight, bias)
        assert_product(linear_rows_reference(x, weight, bias), x, weight, bias)


def test_linear_rows_reads_what_it_is_given(isa: str) -> None:
    wide, tall = normals(20, 96, dtype=torch.bfloat16), normals(64, 3, dtype=torch.bfloat16)
    assert_product(linear_rows(tall.T, wide[:, :64]), tall.T, wide[:, :64])
    assert linear_rows(wide[:0], wide).shape == (0, 20)
    x = normals(1, 8)
    assert torch.equal(linear_rows(normals(2, 0), normals(3, 0)), torch.zeros(2, 3))
    weight = normals(4, 8)
    weight[1, 7] = torch.nan
    assert linear_rows(x, weight).isnan().tolist() == [[False, True, False, False]]


def test_products_of_few_rows_come_here(isa: str) -> None:
    weight, x = normals(40, 64, dtype=torch.bfloat16), normals(3, 64, dtype=torch.bfloat16)
    backends.gemm_dtypes.cache_clear()
    found = matmul(x, weight.T)
    if torch.bfloat16 in backends.gemm_dtypes():
        assert torch.equal(found, linear_rows(x, weight))
    assert_product(found, x, weight)
    assert_product(
        matmul(x, normals(64, 40, dtype=torch.bfloat16)), x, normals(64, 40).bfloat16().T
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "keys"),
    [(1, 1, 1, 1), (6, 2, 16, 7), (9, 3, 64, 130), (4, 4, 20, 33), (8, 1, 72, 5)],
)
def test_single_query_attention(
    isa: str,
    heads: int,
    groups: int,
    dim: int,
    keys: int,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    q = normals(heads, dim, dtype=dtype)
    cache = normals(2, groups, keys + 9, dim, dtype=dtype)
    k, v = cache[0, :, 3 : 3 + keys], cache[1, :, 3 : 3 + keys]
    scale = dim**-0.5
    each = heads // groups
    wide_k, wide_v = (x.double().repeat_interleave(each, dim=0) for x in (k, v))
    scores = scale * (wide_k @ q.double()[:, :, None])[..., 0]
    spread = scale * (wide_k.abs() @ q.double().abs()[:, :, None])[..., 0].amax()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.softmax(dim=-1)
    exact = (weights[:, None] @ wide_v)[:, 0]
    magnitude = (weights[:, None] @ wide_v.abs())[:, 0]
    # A score is off by (D + 16) roundings of its terms, and its exponential by as much, relatively;
    # twice that through the sum below it, and (S + 32) roundings of each sum over keys.
    relative = 2 * ((dim + 24) * spread + keys + 32) * 2**-24
    bound = relative * magnitude + ROUNDOFF[dtype] * (exact.abs() + relative * magnitude)
    for found in (
        single_query_attention(q, k, v, scale, softcap),
        single_query_attention_reference(q, k, v, scale, softcap),
    ):
        assert found.dtype == dtype
        assert torch.all((found.double() - exact).abs() <= bound)


def test_scores_of_any_size_neither_overflow_nor_vanish(isa: str) -> None:
    q, k = torch.full((1, 4), 100.0), torch.zeros(1, 20, 4)
    k[0, 11] = 100.0
    v = torch.arange(20.0)[None, :, None].expand(1, 20, 4)
    assert torch.equal(single_query_attention(q, k, v.contiguous(), 1.0), torch.full((1, 4), 11.0))
    assert torch.equal(single_query_attention(-q, k, v.contiguous(), 0.0), torch.full((1, 4), 9.5))


def test_threads_change_no_bit(isa: str) -> None:
    x, weight = normals(2, 512, dtype=torch.bfloat16), normals(1000, 512, dtype=torch.bfloat16)
    q, k = normals(8, 64), normals(4, 900, 64)
    alone = linear_rows(x, weight), single_query_attention(q, k, k, 0.1)
    torch.set_num_threads(2)
    assert torch.equal(linear_rows(x, weight), alone[0])
    assert torch.equal(single_query_attention(q, k, k, 0.1), alone[1])


def test_schemas_and_fakes_are_what_they_say() -> None:
    checks = ("test_schema", "test_faketensor")
    x, weight, bias = normals(3, 8), normals(5, 8), normals(5)
    torch.library.opcheck(linear_rows, (x, weight, bias), test_utils=checks)
    q, k, v = normals(4, 8), normals(2, 6, 8), normals(2, 6, 8)
    torch.library.opcheck(single_query_attention, (q, k, v, 0.3, 1.5), test_utils=checks)


ROWS = (normals(3, 8), normals(5, 8), normals(5))
QUERY = (normals(4, 8), normals(2, 6, 8), normals(2, 6, 8), 0.3)
WRONG = [
    (linear_rows, ROWS, 0, normals(3, 7), "one dtype"),
    (linear_rows, ROWS, 0, normals(8), "matrices"),
    (linear_rows, ROWS, 1, normals(5, 8, dtype=torch.float16), "one dtype"),
    (linear_rows, ROWS, 1, normals(8, 5).T, "adjacent elements"),
    (linear_rows, ROWS, 2, normals(4), "bias"),
    (linear_rows, ROWS, 0, torch.zeros(3, 8, dtype=torch.int64), "float32, bfloat16 or float16"),
    (single_query_attention, QUERY, 0, normals(5, 8), "a multiple of 2 heads"),
    (single_query_attention, QUERY, 0, normals(4, 8, 1), r"\[H, D\]"),
    (single_query_attention, QUERY, 0, normals(8, 4).T, "contiguous"),
    (single_query_attention, QUERY, 1, normals(2, 6, 7), "keys"),
    (single_query_attention, QUERY, 1, normals(2, 0, 8), "keys"),
    (single_query_attention, QUERY, 1, normals(2, 8, 6).mT, "features adjacent"),
    (single_query_attention, QUERY, 2, normals(2, 7, 8), "values"),
    (single_query_attention, QUERY, 2, normals(2, 6, 8, dtype=torch.bfloat16), "values"),
]


@pytest.mark.skipif(not backends.native_in_use(), reason="the references check nothing")
@pytest.mark.parametrize(("op", "arguments", "place", "value", "message"), WRONG)
def test_the_operator_names_the_wrong_argument(
    op: object, arguments: tuple[object, ...], place: int, value: object, message: str
) -> None:
    changed = list(arguments)
    changed[place] = value
    with pytest.raises(RuntimeError, match=message):
        op(*changed)  # type: ignore[operator]

"""Products of matrices against float64, on every path: shapes, strides, dtypes, chunks, threads."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import backends, workspace
from halfbyte.kernels.gemm import FEW_ROWS, matmul, matmul_add_, matmul_into_reference

pytestmark = pytest.mark.skipif(not backends.native_in_use(), reason="native kernels are absent")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
into = torch.ops.halfbyte.matmul_into_.default

SHAPES = [
    pytest.param(1, 1, 1, id="one-product"),
    pytest.param(7, 5, 3, id="smaller-than-a-tile"),
    pytest.param(97, 64, 33, id="a-row-block-and-one"),
    pytest.param(13, 385, 17, id="a-depth-block-and-one"),
    pytest.param(100, 800, 420, id="blocks-each-way"),
    pytest.param(3, 0, 5, id="nothing-to-sum"),
    pytest.param(0, 8, 4, id="no-rows"),
    pytest.param(4, 8, 0, id="no-columns"),
]


def normals(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_product(
    c: Tensor, a: Tensor, b: Tensor, plus: Tensor | None = None, alpha: float = 1.0
) -> None:
    """`c` is alpha a b + plus up to roundings of the sum.

    Each of K products and sums, the factor and two more terms in float32 adds at most 2^-24 of the
    sum of magnitudes (two roundings a term without fused multiply-add); storing rounds once.
    """
    exact = alpha * (a.double() @ b.double())
    magnitude = abs(alpha) * (a.double().abs() @ b.double().abs())
    if plus is not None:
        exact += plus.double()
        magnitude += plus.double().abs()
    summing = 2 * (a.shape[1] + 4) * 2**-24 * magnitude
    assert c.shape == exact.shape
    assert torch.all(
        (c.double() - exact).abs() <= summing + ROUNDOFF[c.dtype] * (exact.abs() + summing)
    )


def arranged(t: Tensor, how: str) -> Tensor:
    """The same matrix with other strides."""
    if how == "transposed":
        return t.T.contiguous().T
    if how == "padded":
        wide = torch.full((t.shape[0], t.shape[1] + 5), torch.nan, dtype=t.dtype)
        wide[:, 2:-3] = t
        return wide[:, 2:-3]
    if how == "scattered":
        wide = torch.full((t.shape[0], 2 * t.shape[1]), torch.nan, dtype=t.dtype)
        wide[:, ::2] = t
        return wide[:, ::2]
    return t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
def test_shapes(isa: str, rows: int, depth: int, columns: int, dtype: torch.dtype) -> None:
    a, b = normals(rows, depth, dtype=dtype), normals(depth, columns, dtype=dtype)
    bias = normals(columns, dtype=dtype)
    c = torch.empty(rows, columns, dtype=dtype)  # poisoned: beta = 0 must not read it
    into(c, a, b, None, 1.0, 0.0)
    assert_product(c, a, b)
    into(c, a, b, bias, 1.0, 0.0)
    assert_product(c, a, b, bias.expand(rows, columns))
    before = c.clone()
    into(c, a, b, None, -0.75, 1.0)
    assert_product(c, a, b, before, alpha=-0.75)


@pytest.mark.parametrize("how_a", ["plain", "transposed", "padded", "scattered"])
@pytest.mark.parametrize("how_b", ["plain", "transposed", "padded", "scattered"])
def test_strides(isa: str, how_a: str, how_b: str) -> None:
    a, b = normals(101, 71, dtype=torch.bfloat16), normals(71, 50, dtype=torch.bfloat16)
    c = arranged(torch.zeros(101, 50, dtype=torch.bfloat16), "padded")
    into(c, arranged(a, how_a), arranged(b, how_b), None, 1.0, 0.0)
    assert_product(c, a, b)


@pytest.mark.parametrize("c_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a_dtype", DTYPES, ids=str)
def test_dtypes_mix(
    isa: str, a_dtype: torch.dtype, b_dtype: torch.dtype, c_dtype: torch.dtype
) -> None:
    a, b = normals(20, 41, dtype=a_dtype), normals(41, 24, dtype=b_dtype)
    c = torch.empty(20, 24, dtype=c_dtype)
    into(c, a, b, None, 1.0, 0.0)
    assert_product(c, a, b)


@pytest.fixture
def small_workspace() -> Iterator[None]:
    before = workspace.limit_bytes()
    workspace.set_limit_bytes(40_000)
    yield
    workspace.set_limit_bytes(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_above_the_limit_is_cut(
    isa: str, small_workspace: None, dtype: torch.dtype
) -> None:
    a, b, bias = normals(50, 201, dtype=dtype), normals(201, 333, dtype=dtype), normals(333)
    for factor in (b, b.T.contiguous().T):
        c = torch.empty(50, 333)
        into(c, a, factor, bias, 1.0, 0.0)
        assert_product(c, a, b, bias.expand(50, 333))


def test_threads_and_cuts_change_no_bit(isa: str) -> None:
    a, b = normals(300, 500, dtype=torch.bfloat16), normals(500, 700, dtype=torch.bfloat16)
    results = []
    for threads, limit in ((1, 2**27), (2, 2**27), (2, 100_000)):
        torch.set_num_threads(threads)
        before = workspace.limit_bytes()
        workspace.set_limit_bytes(limit)
        c = torch.empty(300, 700, dtype=torch.bfloat16)
        into(c, a, b, None, 1.0, 0.0)
        results.append(c)
        workspace.set_limit_bytes(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    # A row's sums do not depend on the rows around it.
    part = torch.empty(41, 700, dtype=torch.bfloat16)
    into(part, a[100:141], b, None, 1.0, 0.0)
    assert torch.equal(part, results[0][100:141])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number_reaches_its_row_and_column(isa: str, dtype: torch.dtype) -> None:
    a, b = normals(20, 30, dtype=dtype), normals(30, 40, dtype=dtype)
    a[3, 7] = torch.nan
    b[5, 11] = torch.inf
    c = torch.empty(20, 40)
    into(c, a, b, None, 1.0, 0.0)
    assert c[3].isnan().all()
    assert not c[:, 11].isfinite().any()
    c[3] = c[:, 11:12] = 0
    assert c.isfinite().all()


@pytest.mark.parametrize("rows", [FEW_ROWS - 1, FEW_ROWS, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whichever_body_runs(isa: str, dtype: torch.dtype, rows: int) -> None:
    a, b = normals(rows, 64, dtype=dtype), normals(48, 64, dtype=dtype).T
    bias = normals(48, dtype=dtype)
    assert_product(matmul(a, b), a, b)
    # As a gradient of a float32 parameter: never rounded to the 16 bits of its factors.
    wide = matmul(a, b, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert_product(wide, a, b)
    before = wide.clone()
    matmul_add_(wide, a, b)
    assert_product(wide, a, b, before)
    # PyTorch rounds before it adds in 16 bits: one rounding more, besides those of the sum.
    relative = 3 * ROUNDOFF[dtype] + 2 * (64 + 4) * 2**-24
    c = matmul(a, b, bias)
    exact = a.double() @ b.double() + bias.double()
    magnitude = a.double().abs() @ b.double().abs() + bias.double().abs()
    assert torch.all((c.double() - exact).abs() <= relative * magnitude)
    before = c.clone()
    matmul_add_(c, a, b, alpha=0.5)
    exact = before.double() + 0.5 * (a.double() @ b.double())
    magnitude += before.double().abs()
    assert torch.all((c.double() - exact).abs() <= relative * magnitude)


def test_the_reference_body() -> None:
    a, b, bias = normals(6, 20), normals(20, 9), normals(9)
    c = torch.full((6, 9), torch.nan)
    matmul_into_reference(c, a, b, bias, 2.0, 0.0)
    assert_product(c, a, b, bias.expand(6, 9), alpha=2.0)
    before = c.clone()
    matmul_into_reference(c, a, b, None, 1.0, 0.5)
    assert_product(c, a, b, 0.5 * before)


def test_the_schema_is_what_it_says() -> None:
    arguments = (torch.zeros(6, 9), normals(6, 20), normals(20, 9), normals(9), 2.0, 0.5)
    torch.library.opcheck(into, arguments)


@pytest.mark.parametrize(
    ("c", "a", "b", "bias", "message"),
    [
        (torch.ones(2, 4), torch.ones(2, 3), torch.ones(4, 4), None, "b: matrices .* expected"),
        (torch.ones(2, 4), torch.ones(3), torch.ones(3, 4), None, "b: matrices .* expected"),
        (torch.ones(2, 5), torch.ones(2, 3), torch.ones(3, 4), None, r"c: a matrix \[2, 4\]"),
        (torch.ones(4, 2).T, torch.ones(2, 3), torch.ones(3, 4), None, "adjacent elements"),
        (
            torch.ones(4).expand(2, 4),
            torch.ones(2, 3),
            torch.ones(3, 4),
            None,
            "adjacent elements",
        ),
        (torch.ones(2, 4), torch.ones(2, 3), torch.ones(3, 4), torch.ones(5), "bias: .* 4"),
        (torch.ones(2, 4), torch.ones(2, 3).double(), torch.ones(3, 4), None, "a: aligned"),
        (torch.ones(2, 4), torch.ones(2, 3), torch.ones(3, 4).int(), None, "b: aligned"),
    ],
)
def test_the_operator_names_the_wrong_argument(
    c: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        into(c, a, b, bias, 1.0, 0.0)

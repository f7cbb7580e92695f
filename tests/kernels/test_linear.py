"""Multiplication by 4-bit weights against float64, forward and backward, on every path."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.errors import FormatError, UsageError
from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.kernels import backends, linear, linear_input_gradient, workspace

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}

SHAPES = [
    pytest.param(1, 1, 32, id="one-weight"),
    pytest.param(5, 7, 32, id="smaller-than-a-block"),
    pytest.param(64, 64, 64, id="one-block-a-row"),
    pytest.param(130, 192, 64, id="ragged-outputs"),
    pytest.param(33, 100, 64, id="blocks-cross-rows"),
    pytest.param(9, 101, 32, id="rows-begin-inside-bytes"),
    pytest.param(70, 320, 256, id="wide-blocks-cross-rows"),
    pytest.param(6, 4096 + 1088, 64, id="several-panels-deep"),
    pytest.param(7, 4096, 4096, id="a-block-a-row"),
]
ROWS = [1, 2, 3, 4, 5, 6, 7, 13, 64]
MANY_ROWS = 600  # more than any crossover


def normals(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def weight(out_features: int, in_features: int, block_size: int = 64) -> QuantizedTensor:
    double_quant = (out_features + in_features) % 2 == 0
    w = normals(out_features, in_features)
    return hb.quantize(w, block_size=block_size, double_quant=double_quant)


def assert_product(ours: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """`ours` is a @ b + bias up to roundings of the sum.

    Each of the K products and sums in float32 adds at most 2^-24 of the sum of magnitudes (two
    roundings a term, and the tree of partial sums within K + 16 steps); storing rounds once.
    """
    exact = a.double() @ b.double()
    magnitude = a.double().abs() @ b.double().abs()
    if bias is not None:
        exact += bias.double()
        magnitude += bias.double().abs()
    summing = 2 * (a.shape[-1] + 16) * 2**-24 * magnitude
    bound = summing + ROUNDOFF[ours.dtype] * (exact.abs() + summing)
    assert ours.shape == exact.shape
    assert torch.all((ours.double() - exact).abs() <= bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features", "block_size"), SHAPES)
def test_forward(
    isa: str, out_features: int, in_features: int, block_size: int, dtype: torch.dtype
) -> None:
    q = weight(out_features, in_features, block_size)
    dense = q.dequantize(dtype=dtype)
    bias = normals(out_features, dtype=dtype)
    for rows in ROWS:
        x = normals(rows, in_features, dtype=dtype)
        assert_product(linear(x, q), x, dense.T)
        assert_product(linear(x, q, bias), x, dense.T, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features", "block_size"), SHAPES)
def test_input_gradient(
    isa: str, out_features: int, in_features: int, block_size: int, dtype: torch.dtype
) -> None:
    q = weight(out_features, in_features, block_size)
    dense = q.dequantize(dtype=dtype)
    for rows in (1, 13):
        gradient = normals(rows, out_features, dtype=dtype)
        assert_product(linear_input_gradient(gradient, q), gradient, dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(isa: str, dtype: torch.dtype) -> None:
    q = weight(40, 192)
    dense = q.dequantize(dtype=dtype)
    x, bias = normals(MANY_ROWS, 192, dtype=dtype), normals(40, dtype=dtype)
    assert_product(linear(x, q), x, dense.T)
    assert_product(linear(x, q, bias), x, dense.T, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_go_through_the_workspace(isa: str, dtype: torch.dtype) -> None:
    workspace.release()
    q = weight(40, 192)
    x = normals(MANY_ROWS, 192, dtype=dtype)
    linear(x, q)
    held = workspace.held_bytes()
    assert held > 0
    linear(x, q)
    linear_input_gradient(normals(MANY_ROWS, 40, dtype=dtype), q)
    assert workspace.held_bytes() == held
    workspace.release()
    assert workspace.held_bytes() == 0


@pytest.fixture
def small_workspace() -> Iterator[None]:
    before = workspace.limit_bytes()
    workspace.set_limit_bytes(5000)
    yield
    workspace.set_limit_bytes(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [100, 192, 5000])
def test_a_weight_above_the_limit_is_cut(
    isa: str, small_workspace: None, in_features: int, dtype: torch.dtype
) -> None:
    q = weight(70, in_features)
    dense = q.dequantize(dtype=dtype)
    x, bias = normals(MANY_ROWS, in_features, dtype=dtype), normals(70, dtype=dtype)
    assert_product(linear(x, q), x, dense.T)
    assert_product(linear(x, q, bias), x, dense.T, bias)
    gradient = normals(MANY_ROWS, 70, dtype=dtype)
    assert_product(linear_input_gradient(gradient, q), gradient, dense)


def test_the_limit_must_be_positive() -> None:
    with pytest.raises(UsageError, match="at least 1 byte expected, found 0"):
        workspace.set_limit_bytes(0)


def test_leading_dimensions_and_strides(isa: str) -> None:
    q = weight(48, 64)
    dense = q.dequantize(dtype=torch.bfloat16)
    wide = normals(10, 128, dtype=torch.bfloat16)
    for x in (
        wide[:, ::2],
        wide[:, 3:67],
        wide[::3, :64],
        normals(64, 9, dtype=torch.bfloat16).T,
        normals(1, 64, dtype=torch.bfloat16).expand(5, 64),
        normals(64, dtype=torch.bfloat16),
        normals(2, 3, 64, dtype=torch.bfloat16),
        normals(2, 64, 3, dtype=torch.bfloat16).mT,
    ):
        y = linear(x, q)
        assert y.shape == (*x.shape[:-1], 48)
        assert_product(y, x, dense.T)


def test_no_rows(isa: str) -> None:
    q = weight(48, 64)
    assert linear(torch.empty(0, 64), q).shape == (0, 48)
    assert linear(torch.empty(2, 0, 64), q).shape == (2, 0, 48)
    assert linear_input_gradient(torch.empty(0, 48), q).shape == (0, 64)


def test_unusual_scales_in_the_direct_path(isa: str) -> None:
    # Subnormal, zero and infinite scales leave the fast way to round a table.
    w = normals(4, 256)
    w[0, :64] *= 1e-40
    w[1, 64:128] = 0
    w[2] *= 1e37
    q = hb.quantize(w, double_quant=False)
    for rows in (1, 5):
        x = normals(rows, 256, dtype=torch.bfloat16)
        assert_product(linear(x, q), x, q.dequantize(dtype=torch.bfloat16).T)
    infinite = QuantizedTensor(
        q.codes, torch.full_like(q.scales, float("inf")), q.codebook, 64, q.shape, q.dtype
    )
    assert not linear(x, infinite).isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features", "block_size"), SHAPES)
def test_few_rows_multiply_by_the_dequantized_weights(
    isa: str, out_features: int, in_features: int, block_size: int, dtype: torch.dtype
) -> None:
    """A row that is zero but for a one takes out single weights, bit for bit."""
    q = weight(out_features, in_features, block_size)
    dense = q.dequantize(dtype=dtype)
    features = torch.linspace(0, in_features - 1, 40).long()
    for rows in (1, 2, 3, 4, 10):
        for some in features.split(rows):
            x = torch.nn.functional.one_hot(some, in_features).to(dtype)
            assert torch.equal(linear(x, q), dense[:, some].T)


def test_nan_scales_in_the_direct_path(isa: str) -> None:
    # Rounding by adding to the bits would carry out of this NaN, into -0.
    q = hb.quantize(normals(8, 128), double_quant=False)
    scales = q.scales.clone()
    scales.view(torch.int32)[3] = 0x7FFFFFFF
    damaged = QuantizedTensor(q.codes, scales, q.codebook, 64, q.shape, q.dtype)
    result = linear(torch.ones(1, 128, dtype=torch.bfloat16), damaged)
    assert result.isnan().nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("rows", [1, 6, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit_of_few_rows(isa: str, dtype: torch.dtype, rows: int) -> None:
    q = weight(1030, 384)
    x = normals(rows, 384, dtype=dtype)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(linear(x, q))
    assert torch.equal(*results)
    assert torch.equal(linear(x, q), results[0])


def test_calls_from_several_threads_share_nothing(isa: str) -> None:
    q = weight(70, 192)
    x = [normals(rows, 192, dtype=torch.bfloat16) for rows in (1, 5, 600, 601)]
    expected = [linear(each, q) for each in x]
    failures: list[str] = []

    def work(seed: int) -> None:
        for i in range(20):
            index = (seed + i) % len(x)
            if not torch.equal(linear(x[index], q), expected[index]):
                failures.append(f"thread {seed}, call {i}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("rows", [3, MANY_ROWS])
def test_autograd_equals_that_of_the_dense_layer(isa: str, rows: int) -> None:
    q = weight(48, 64)
    dense = q.dequantize(dtype=torch.float32)
    x = normals(rows, 64).requires_grad_()
    bias = normals(48).requires_grad_()
    y = linear(x, q, bias)
    gradient = normals(rows, 48)
    for_x, for_bias = torch.autograd.grad(y, (x, bias), gradient)
    assert_product(for_x, gradient, dense)
    torch.testing.assert_close(for_bias, gradient.sum(dim=0))
    assert not linear(x.detach(), q, bias.detach()).requires_grad


def test_autograd_of_the_gradient(isa: str) -> None:
    q = weight(48, 64)
    dense = q.dequantize(dtype=torch.float32)
    x = normals(3, 64).requires_grad_()
    seed = normals(3, 48).requires_grad_()
    (for_x,) = torch.autograd.grad(linear(x, q), x, seed, create_graph=True)
    probe = normals(3, 64)
    (for_seed,) = torch.autograd.grad(for_x, seed, probe)
    assert_product(for_seed, probe, dense.T)


def test_autograd_keeps_codes_and_nothing_decoded(isa: str) -> None:
    q = weight(48, 64)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        linear(normals(3, 64).requires_grad_(), q)
    assert all(t.data_ptr() in {k.data_ptr() for k in _tensors(q)} for t in kept)


def _tensors(q: QuantizedTensor) -> list[Tensor]:
    return [t for t in q.operator_arguments() if isinstance(t, Tensor)]


def test_zero_points_are_decoded_by_the_format() -> None:
    q = hb.quantize(normals(48, 64), "int4_affine")
    x = normals(3, 64)
    assert_product(linear(x, q), x, q.dequantize(dtype=torch.float32).T)
    gradient = normals(3, 48)
    assert_product(linear_input_gradient(gradient, q), gradient, q.dequantize(dtype=torch.float32))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, 63), r"x: \[..., 64\] in .* shape \[48, 64\], found float32 \[3, 63\]"),
        (torch.ones(()), r"found float32 \[\]"),
        (torch.ones(3, 64, dtype=torch.float64), r"found float64 \[3, 64\]"),
    ],
)
def test_inputs_that_do_not_fit(x: Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        linear(x, weight(48, 64))


def test_gradients_and_weights_that_do_not_fit() -> None:
    with pytest.raises(FormatError, match=r"gradient: \[..., 48\]"):
        linear_input_gradient(torch.ones(3, 64), weight(48, 64))
    with pytest.raises(FormatError, match="weight has two dimensions"):
        linear(torch.ones(3, 64), hb.quantize(torch.ones(64)))


@pytest.mark.skipif(not backends.native_in_use(), reason="native kernels are absent")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.ones(3, 65)}, "x: a last dimension of 64"),
        ({0: torch.ones(3, 64, dtype=torch.float64)}, "x: aligned float32"),
        ({1: torch.ones(7, dtype=torch.uint8)}, "codes: .* 1536 elements"),
        ({8: 0}, "block_size: a power of two"),
        ({9: 0}, "out_features: at least 1"),
        ({9: -48}, "out_features: at least 1"),
        ({10: 0}, "in_features: at least 1"),
        ({9: 2**62}, "out_features: a weight that fits"),
        ({11: torch.ones(47)}, "bias: .* 48 elements"),
        ({11: torch.ones(48, dtype=torch.bfloat16)}, "bias: .* Float"),
    ],
)
def test_the_operator_names_the_wrong_argument(changes: dict[int, object], message: str) -> None:
    arguments: list[object] = [torch.ones(3, 64), *weight(48, 64).operator_arguments(), 48, 64]
    arguments.append(torch.ones(48))
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.halfbyte.linear_4bit(*arguments)


def test_schemas_fakes_and_gradients_are_what_they_say() -> None:
    forward = torch.ops.halfbyte.linear_4bit.default
    backward = torch.ops.halfbyte.linear_4bit_input_gradient.default
    x, bias = normals(3, 64).requires_grad_(), normals(48).requires_grad_()
    gradient = normals(3, 48).requires_grad_()
    arguments = (*weight(48, 64).operator_arguments(), 48, 64)
    torch.library.opcheck(forward, (x, *arguments, bias))
    torch.library.opcheck(backward, (gradient, *arguments))
    plain = hb.quantize(normals(48, 64), double_quant=False).operator_arguments()
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward, (x, *plain, 48, 64), test_utils=quick)

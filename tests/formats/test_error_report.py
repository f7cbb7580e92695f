"""The error report against the formulas written out on whole tensors in float64."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.errors import FormatError
from halfbyte.formats import error_report as module
from halfbyte.formats.double_quantization import DoubleQuantized
from halfbyte.formats.error_report import COLUMNS, ErrorReport, ModelErrorReport, combine_reports

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODEBOOKS = ["nf4", "fp4", "int4", "int4_affine"]

# Both sides sum the same float64 terms in another order: n roundings of 2^-53 at most.
RELATIVE = 1e-11


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4096)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        pytest.param((3, 5), 64, id="one-short-block"),
        pytest.param((64, 64), 64, id="one-chunk"),
        pytest.param((97, 131), 32, id="odd"),
        pytest.param((5, 4096), 4096, id="long-blocks"),
    ],
)
def test_equals_the_formulas(
    codebook: str,
    dtype: torch.dtype,
    double_quant: bool,
    shape: tuple[int, ...],
    block_size: int,
    small_chunks: None,
) -> None:
    weight = normal(*shape, dtype=dtype)
    options = {"codebook": codebook, "block_size": block_size}
    q = hb.quantize(weight, double_quant=double_quant, **options)
    plain = hb.quantize(weight, double_quant=False, **options)
    report = hb.error_report(weight, q, name="layers.0.w")

    w = weight.double()
    error = w - q.dequantize().double()
    relative = (error.square().sum() / w.square().sum()).sqrt().item()
    before = ((w - plain.dequantize().double()).square().sum() / w.square().sum()).sqrt().item()
    assert report.name == "layers.0.w"
    assert report.num_elements == weight.numel()
    assert report.original_bytes == weight.numel() * weight.element_size()
    assert report.nbytes == q.nbytes
    assert report.bits_per_element == q.bits_per_element
    assert report.relative_rms_error == pytest.approx(relative, rel=RELATIVE)
    assert report.snr_db == pytest.approx(-20 * math.log10(relative), rel=RELATIVE)
    assert report.max_abs_error == error.abs().max().item()
    assert report.saved_bytes == plain.nbytes - q.nbytes
    assert report.double_quantization_error == pytest.approx(
        relative - before, abs=RELATIVE * relative
    )


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(30_000)
    q = hb.quantize(weight)
    whole = hb.error_report(weight, q)
    monkeypatch.setattr(module, "CHUNK", 4096)
    chunked = hb.error_report(weight, q)
    for field in fields(ErrorReport)[1:]:  # all but the name
        assert getattr(chunked, field.name) == pytest.approx(
            getattr(whole, field.name), rel=RELATIVE
        )


def test_bits_of_a_large_weight() -> None:
    weight = torch.zeros(4096, 4096, dtype=torch.bfloat16)
    assert hb.error_report(weight, hb.quantize(weight)).cells()[2] == "4.127"
    plain = hb.quantize(weight, double_quant=False)
    assert hb.error_report(weight, plain).cells()[2] == "4.500"


def test_an_error_is_seen_wherever_it_is(small_chunks: None) -> None:
    weight = normal(5 * 4096 + 3)
    q = hb.quantize(weight)
    exact = q.dequantize()
    assert hb.error_report(exact, replace_scales(q, q.scales)).sum_squared_error == 0.0
    for index in (0, 4095, 4096, 20_000, weight.numel() - 1):
        moved = exact.clone()
        moved[index] += 1.0
        report = hb.error_report(moved, q)
        error = (moved[index].double() - exact[index].double()).item()
        assert report.max_abs_error == abs(error)
        assert report.sum_squared_error == error**2


def replace_scales(q: hb.QuantizedTensor, scales: Tensor) -> hb.QuantizedTensor:
    return replace(q, stored_scales=scales)


def test_scales_of_other_weights_are_unknown() -> None:
    weight = normal(64, 64)
    q = hb.quantize(weight)
    assert isinstance(q.stored_scales, DoubleQuantized)
    report = hb.error_report(weight * 1.5, q)
    assert report.sum_squared_error_before is None
    assert report.double_quantization_error is None
    assert report.cells()[-1] == "unknown"
    assert report.to_json()["double_quantization_error"] is None


def test_only_the_scales_double_quantized() -> None:
    weight = normal(64, 64)
    double = hb.quantize(weight, "int4_affine")
    plain = hb.quantize(weight, "int4_affine", double_quant=False)
    mixed = replace(double, stored_zero_points=plain.stored_zero_points)
    report = hb.error_report(weight, mixed)
    assert report.saved_bytes == plain.nbytes - mixed.nbytes
    assert report.double_quantization_error is not None


def test_zeros_have_no_error() -> None:
    weight = torch.zeros(1000)
    report = hb.error_report(weight, hb.quantize(weight))
    assert report.relative_rms_error == 0.0
    assert report.snr_db == math.inf
    assert report.to_json()["snr_db"] is None
    assert report.double_quantization_error == 0.0


def test_zeros_that_come_back_as_something() -> None:
    report = hb.error_report(torch.zeros(64), hb.quantize(torch.ones(64)))
    assert report.relative_rms_error == math.inf
    assert report.snr_db == -math.inf
    assert report.max_abs_error == 1.0
    json.dumps(report.to_json(), allow_nan=False)


def test_nothing_at_all() -> None:
    report = hb.error_report(torch.zeros(0), hb.quantize(torch.zeros(0)))
    assert report.num_elements == 0
    assert report.bits_per_element == 0.0
    assert report.max_abs_error == 0.0


def test_the_weight_may_be_strided() -> None:
    weight = normal(96, 64).T
    q = hb.quantize(weight)
    assert hb.error_report(weight, q) == hb.error_report(weight.contiguous(), q)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        pytest.param(torch.zeros(2, 50), r"w: float32 \[2, 50\] on cpu .*\[100\]", id="shape"),
        pytest.param(torch.zeros(100, device="meta"), "on meta does not match", id="device"),
        pytest.param(torch.zeros(100, dtype=torch.int32), "w: a dense tensor of", id="dtype"),
        pytest.param(torch.full((100,), math.nan), "w holds 100 NaN", id="nan"),
    ],
)
def test_what_does_not_match_is_refused(weight: Tensor, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        hb.error_report(weight, hb.quantize(torch.zeros(100)), name="w")


def test_a_model_is_all_its_elements_together() -> None:
    small, large = normal(100, seed=1), normal(300, 200, seed=2) * 5
    reports = [hb.error_report(w, hb.quantize(w), name=n) for n, w in [("a", small), ("b", large)]]
    total = ModelErrorReport(tuple(reports)).total
    w = torch.cat((small, large.reshape(-1))).double()
    decoded = torch.cat([hb.quantize(x).dequantize().reshape(-1) for x in (small, large)]).double()
    error = w - decoded
    assert total.name == "all"
    assert total.num_elements == 60_100
    assert total.original_bytes == 240_400
    assert total.nbytes == sum(r.nbytes for r in reports)
    assert total.saved_bytes == sum(r.saved_bytes for r in reports)
    assert total.max_abs_error == error.abs().max().item()
    assert total.sum_squares == pytest.approx(w.square().sum().item(), rel=RELATIVE)
    assert total.relative_rms_error == pytest.approx(
        (error.square().sum() / w.square().sum()).sqrt().item(), rel=RELATIVE
    )
    # The mean of the two is something else: the tensors differ in size and scale.
    mean = (reports[0].relative_rms_error + reports[1].relative_rms_error) / 2
    assert abs(total.relative_rms_error - mean) > 1e-4
    assert total.sum_squared_error_before == pytest.approx(
        sum(r.sum_squared_error_before or 0.0 for r in reports), rel=RELATIVE
    )


def test_one_unknown_part_makes_the_whole_unknown() -> None:
    weight = normal(128)
    known = hb.error_report(weight, hb.quantize(weight))
    unknown = replace(known, sum_squared_error_before=None)
    assert combine_reports([known, unknown], name="x").double_quantization_error is None
    assert combine_reports([], name="x").max_abs_error == 0.0


def test_text_and_json() -> None:
    report = ErrorReport(
        name="w",
        num_elements=1_000_000,
        original_bytes=2_000_000,
        nbytes=515_875,
        sum_squares=400.0,
        sum_squared_error=4.0,
        max_abs_error=0.01234567,
        saved_bytes=46_625,
        sum_squared_error_before=3.9,
    )
    assert report.cells() == (
        "w",
        "1,000,000",
        "4.127",
        "10.000%",
        "20.00",
        "0.0123",
        "46,625 B",
        "+0.1258%",
    )
    assert len(COLUMNS) == len(report.cells())
    assert str(report).startswith("w: parameters 1,000,000, bits 4.127, rel. RMS 10.000%")
    plain = replace(report, saved_bytes=0)
    assert plain.cells()[-2:] == ("-", "-")
    record = json.loads(json.dumps(ModelErrorReport((report,)).to_json()))
    assert record["tensors"][0]["relative_rms_error"] == pytest.approx(0.1)
    assert record["total"]["snr_db"] == pytest.approx(20.0)
    assert record["total"]["bytes"] == 515_875

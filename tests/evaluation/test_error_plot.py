"""The picture of an error report: what is grouped, drawn and refused."""

from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import UsageError
from halfbyte.evaluation.error_plot import Place, find_place, group_by_place, plot_errors
from halfbyte.formats.error_report import ModelErrorReport, combine_reports


def report(name: str, seed: int = 0) -> hb.ErrorReport:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    return hb.error_report(weight, hb.quantize(weight), name=name)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.self_attn.q_proj.weight", Place(12, "self_attn.q_proj")),
        ("blk.0.ffn_down.weight", Place(0, "ffn_down")),
        ("model.layers.3.mlp.experts.7.up_proj.weight", Place(3, "mlp.experts.*.up_proj")),
        ("0.weight", Place(None, "0")),
        ("lm_head.weight", Place(None, "lm_head")),
        ("layers.1.experts.2", Place(1, "experts.*")),
        ("h2o.weight", Place(None, "h2o")),
    ],
)
def test_place_of_a_name(name: str, place: Place) -> None:
    assert find_place(name) == place


def test_tensors_of_one_place_are_taken_together() -> None:
    names = ["layers.0.e.1.w", "layers.0.e.2.w", "layers.1.e.1.w", "head"]
    reports = [report(name, seed) for seed, name in enumerate(names)]
    groups = group_by_place(reports)
    assert list(groups) == ["e.*.w", "head"]
    assert list(groups["e.*.w"]) == [0, 1]
    assert groups["e.*.w"][0] == combine_reports(reports[:2], name="e.*.w")
    assert groups["head"][None].sum_squared_error == reports[3].sum_squared_error


@pytest.mark.parametrize(
    ("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_a_picture_is_written(suffix: str, begin: bytes, tmp_path: Path) -> None:
    model = ModelErrorReport(
        tuple(
            report(n, i) for i, n in enumerate(["layers.0.a", "layers.1.a", "layers.1.b", "head"])
        )
    )
    path = tmp_path / f"error{suffix}"
    plot_errors(model, path, title="model to NF4")
    content = path.read_bytes()
    assert content.startswith(begin)
    if suffix == ".svg":
        text = content.decode()
        for comment in ("model to NF4", "Error of each layer", "Share of the squared error"):
            assert f"<!-- {comment}" in text
        for kind in ("a", "b", "head"):
            assert f"<!-- {kind} -->" in text


def test_without_layers_only_the_shares_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "error.svg"
    plot_errors(ModelErrorReport((report("head"), report("embed"))), path, title="t")
    text = path.read_text()
    assert "Share of the squared error" in text
    assert "Error of each layer" not in text


def test_a_model_without_error_can_be_drawn(tmp_path: Path) -> None:
    zeros = torch.zeros(64)
    exact = hb.error_report(zeros, hb.quantize(zeros), name="layers.0.a")
    plot_errors(ModelErrorReport((exact,)), tmp_path / "error.png", title="t")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    model = ModelErrorReport((report("head"),))
    with pytest.raises(UsageError, match=r"error\.gif: a name that ends in \.png, \.svg, \.pdf"):
        plot_errors(model, tmp_path / "error.gif", title="t")
    with pytest.raises(UsageError, match="no tensors"):
        plot_errors(ModelErrorReport(()), tmp_path / "error.png", title="t")

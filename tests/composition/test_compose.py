"""Composing adapter directories: what PEFT makes of the result, what it records, what is refused."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from composition.random_adapters import FEATURES, delta64, random_adapter
from halfbyte.adapters.adapter import Adapter
from halfbyte.adapters.fingerprint import fingerprint_adapter
from halfbyte.adapters.peft_files import read_adapter, write_adapter
from halfbyte.adapters.stack import Stack, StackPart
from halfbyte.adapters.stack_files import write_stack
from halfbyte.composition.compose import REPORT_FILE
from halfbyte.errors import (
    FormatError,
    MissingFileError,
    StorageError,
    UnsafeArtifactError,
    UsageError,
    VerificationError,
)
from tiny_models import make_decoder, make_oracle, random_tokens

peft = pytest.importorskip("peft")

BASE = {"base": {"path": "models/base", "fingerprint": "f" * 64}}


def write(directory: Path, **adapters: Adapter) -> dict[str, Path]:
    for name, adapter in adapters.items():
        write_adapter(adapter, directory / name)
    return {name: directory / name for name in adapters}


@pytest.fixture
def ab(tmp_path: Path) -> dict[str, Path]:
    return write(
        tmp_path,
        a=random_adapter(1, provenance=BASE | {"version": 1}),
        b=random_adapter(2, 8, 3.0, use_rslora=True, provenance=BASE | {"version": 1}),
    )


@pytest.fixture(scope="module")
def oracle() -> Any:
    return make_oracle("llama")


@pytest.fixture(scope="module")
def three(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of different rank, scaling rule and layers for a tiny model."""
    linears = {
        path: (module.out_features, module.in_features)
        for path, module in oracle.named_modules()
        if path.endswith("_proj")
    }
    attention = {path: shape for path, shape in linears.items() if "self_attn" in path}
    first = {path: shape for path, shape in linears.items() if ".0." in path}
    return write(
        tmp_path_factory.mktemp("adapters"),
        sql=random_adapter(1, 4, 2.0, features=linears),
        tone=random_adapter(2, 16, 1.5, features=attention, use_rslora=True),
        verbose=random_adapter(3, 8, 4.0, features=first),
    )


TOKENS = random_tokens(24)

EXPRESSIONS = {
    "0.7*sql + 0.3*tone - 0.2*verbose": {"sql": 0.7, "tone": 0.3, "verbose": -0.2},
    "tone > verbose": {"tone": 1.0, "verbose": 1.0},
    # Everything that 48 features can hold.
    "svd(sql + ties(2*tone, density=1), fidelity=1)": {"sql": 1.0, "tone": 2.0},
}


def merged_logits(oracle: Any, adapters: dict[str, Path], weights: dict[str, float]) -> Tensor:
    """Of the model with the sum added to its weights, all of it in float64."""
    model = copy.deepcopy(oracle).double()
    with torch.no_grad():
        for name, weight in weights.items():
            adapter = read_adapter(adapters[name])
            for path in adapter.modules:
                matrix = model.get_submodule(path).weight
                matrix += weight * delta64(adapter, path, tuple(matrix.shape))
        return model(TOKENS[None]).logits[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_peft_gives_the_same_logits(
    expression: str, oracle: Any, three: dict[str, Path], tmp_path: Path
) -> None:
    made = hb.compose(expression, adapters=three, out=tmp_path / "mix")
    expected = merged_logits(oracle, three, EXPRESSIONS[expression])
    with torch.no_grad():
        base = oracle(TOKENS[None]).logits[0].double()
        model = peft.PeftModel.from_pretrained(copy.deepcopy(oracle), made.path)
        theirs = model(input_ids=TOKENS[None]).logits[0].double()
    scale = expected.abs().max()
    assert (expected - base).abs().max() > 0.1 * scale
    # Four layers of float32 products of up to 80 terms; float32 factors cost as much as one.
    assert (theirs - expected).abs().max() < 2e-5 * scale


def test_our_decoder_gives_them_too(oracle: Any, three: dict[str, Path], tmp_path: Path) -> None:
    from halfbyte.generation.adapters import attach_adapters  # noqa: PLC0415
    from halfbyte.layers.segments import pack  # noqa: PLC0415

    expression = next(iter(EXPRESSIONS))
    made = hb.compose(expression, adapters=three, out=tmp_path / "mix")
    decoder = make_decoder(oracle)
    attach_adapters(decoder, {"mix": made.path})
    ours = decoder.logits(TOKENS, pack([len(TOKENS)])).double()
    expected = merged_logits(oracle, three, EXPRESSIONS[expression])
    assert (ours - expected).abs().max() < 2e-5 * expected.abs().max()


def test_the_result_names_its_parts(ab: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "mix"
    made = hb.compose("0.5*a - b", adapters=ab, out=out)
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["base"] == BASE["base"]
    assert provenance["composition"]["expression"] == "0.5*a - b"
    for name, weight in (("a", 0.5), ("b", -1.0)):
        record = provenance["composition"]["parts"][name]
        assert record == {
            "path": str(ab[name]),
            "fingerprint": fingerprint_adapter(read_adapter(ab[name])),
            "weight": weight,
        }
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (12, 12, False)
    report = json.loads((out / REPORT_FILE).read_text())
    assert report["exact"]
    assert [layer["path"] for layer in report["layers"]] == list(FEATURES)
    assert made.notes == ()
    assert read_adapter(out).provenance == made.adapter.provenance


def test_the_report_adds_up(ab: dict[str, Path], tmp_path: Path) -> None:
    made = hb.compose("a + b", adapters=ab, out=tmp_path / "small", rank=3)
    assert made.expression == "svd(a + b, rank=3)"
    report = made.report
    assert not report.exact
    (total,) = report.totals()
    energies = []
    for layer in report.layers:
        shape = FEATURES[layer.path]
        dense = sum(delta64(read_adapter(ab[n]), layer.path, shape) for n in "ab")
        squares = torch.linalg.svdvals(dense).square()
        energies.append((squares.sum().item(), squares[3:].sum().item()))
        assert (layer.cuts[0].energy, layer.cuts[0].dropped) == pytest.approx(energies[-1])
        assert layer.energy == pytest.approx(squares[:3].sum().item(), rel=1e-6)
    assert total.energy == pytest.approx(sum(e for e, _ in energies))
    assert total.dropped == pytest.approx(sum(d for _, d in energies))
    assert total.relative_error == pytest.approx((1 - total.kept) ** 0.5)
    rows = list(report.rows())
    assert [row[0] for row in rows] == ["q_proj", "up", "a + b"]
    assert rows[-1][1:3] == ("3", "3")
    assert json.loads((made.path / REPORT_FILE).read_text()) == report.to_json()


def test_a_composition_can_be_a_part(ab: dict[str, Path], tmp_path: Path) -> None:
    mix = hb.compose("a + b", adapters=ab, out=tmp_path / "mix").path
    again = hb.compose("mix - b", adapters={"mix": mix, **ab}, out=tmp_path / "again", rank=4)
    assert again.notes == ("the expression does not name a",)
    for path in FEATURES:
        torch.testing.assert_close(
            delta64(again.adapter, path, FEATURES[path]),
            delta64(read_adapter(ab["a"]), path, FEATURES[path]),
            rtol=1e-5,
            atol=1e-6,
        )


def test_progress_is_told(ab: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    hb.compose("a", adapters=ab, out=tmp_path / "x", progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def stacked(below: Adapter | None, seed: int) -> Adapter:
    over = [] if below is None else [{"name": "a", "fingerprint": fingerprint_adapter(below)}]
    return random_adapter(seed, provenance=BASE | {"on_top_of": over})


def test_a_stack_keeps_its_order(tmp_path: Path) -> None:
    first = stacked(None, 1)
    adapters = write(tmp_path, a=first, b=stacked(first, 2), c=stacked(None, 3))
    made = hb.compose("a > b", adapters=adapters, out=tmp_path / "ab")
    assert made.notes == ("the expression does not name c",)
    same = hb.compose("a + b", adapters=adapters, out=tmp_path / "sum").adapter
    assert fingerprint_adapter(made.adapter) == fingerprint_adapter(same)
    refused = {
        "b > a": r"b was trained on top of a \(\w+\), and would stand on the base alone",
        "a > c": r"c was trained on top of the base alone, and would stand on a",
        "c > b": r"b was trained on top of a \(\w+\), and would stand on c",
    }
    for expression, reason in refused.items():
        with pytest.raises(VerificationError) as caught:
            hb.compose(expression, adapters=adapters, out=tmp_path / "no")
        assert re.search(reason, str(caught.value))
    alone = hb.compose("b", adapters=adapters, out=tmp_path / "alone")
    assert "b was trained on top of a, which is not part of this" in alone.notes


def test_a_stack_directory_is_a_part(tmp_path: Path) -> None:
    first = stacked(None, 1)
    second = stacked(first, 2)
    members = (StackPart.of("a", first), StackPart.of("b", second))
    over = [{"name": part.name, "fingerprint": part.fingerprint} for part in members]
    third = random_adapter(3, provenance=BASE | {"on_top_of": over})
    adapters = write(tmp_path, a=first, b=second, c=third) | {"ab": tmp_path / "ab"}
    write_stack(Stack(members), tmp_path / "ab")
    whole = hb.compose("ab > c", adapters=adapters, out=tmp_path / "whole")
    assert whole.notes == ("the expression does not name a, b",)
    same = hb.compose("a > b > c", adapters=adapters, out=tmp_path / "same")
    for path, features in FEATURES.items():
        torch.testing.assert_close(
            delta64(whole.adapter, path, features), delta64(same.adapter, path, features)
        )
    with pytest.raises(VerificationError, match="b was trained on top of a"):
        hb.compose("c > ab", adapters=adapters, out=tmp_path / "no")
    with pytest.raises(VerificationError, match="nothing stands on itself"):
        hb.compose("ab > b", adapters=adapters, out=tmp_path / "no")


def test_what_cannot_be_verified_is_noted(ab: dict[str, Path], tmp_path: Path) -> None:
    foreign = random_adapter(3)
    adapters = ab | write(tmp_path, c=Adapter(foreign.modules, base_model="hub/other"))
    made = hb.compose("a + c", adapters=adapters, out=tmp_path / "x")
    assert "c: its base is known by name only (hub/other), so it was not compared" in made.notes
    assert any("name their base differently" in note for note in made.notes)
    assert any("does not name b" in note for note in made.notes)


def test_everything_that_does_not_fit_is_listed(ab: dict[str, Path], tmp_path: Path) -> None:
    other = {"base": {"fingerprint": "0" * 64}}
    wider = {path: (o, i + 1) for path, (o, i) in FEATURES.items()}
    adapters = ab | write(tmp_path, c=random_adapter(3, features=wider, provenance=other))
    with pytest.raises(VerificationError, match="6 problems") as caught:
        hb.compose("a + b + c", adapters=adapters, out=tmp_path / "x")
    text = str(caught.value)
    assert "c was trained on the base 0000000000000000 (models/base)" in text
    assert "layers.0.up: [40, 16] in a, [40, 17] in c: their bases differ" in text
    adapters |= write(tmp_path, d=random_adapter(3, features=wider, provenance=BASE))
    with pytest.raises(FormatError, match="3 problems"):
        hb.compose("a + d", adapters=adapters, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_all_unreadable_adapters_are_listed(ab: dict[str, Path], tmp_path: Path) -> None:
    bad = random_adapter(3)
    bad.modules["layers.0.up"].a_RI[0, 0] = float("nan")
    bad.modules["layers.1.q_proj"].b_OR[0, 0] = float("inf")
    adapters = ab | write(tmp_path, c=bad) | {"d": tmp_path / "nowhere"}
    with pytest.raises(FormatError, match="adapters cannot be read: 3 problems") as caught:
        hb.compose("a + c + d", adapters=adapters, out=tmp_path / "x")
    text = str(caught.value)
    for part in ("c: ", "up.lora_A: holds NaN", "q_proj.lora_B: holds NaN", "d: ", "nowhere"):
        assert part in text
    with pytest.raises(MissingFileError):
        hb.compose("a + d", adapters=adapters, out=tmp_path / "x")
    link = tmp_path / "linked"
    link.mkdir()
    (link / "adapter_config.json").mkdir()
    with pytest.raises(UnsafeArtifactError):
        hb.compose("c + e", adapters=adapters | {"e": link}, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("a - a", "nothing is left"),
        ("0*a", "nothing is left"),
        ("1e39*1e2*a", "values beyond float32"),
    ],
)
def test_no_adapter_is_refused(
    expression: str, reason: str, ab: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=reason):
        hb.compose(expression, adapters=ab, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


LIMITS = [({"rank": 0}, "rank: at least 1"), ({"fidelity": 1.5}, "fidelity: above 0"), ({"rank": 1, "fidelity": 0.5}, "found both")]  # fmt: skip


@pytest.mark.parametrize(("limit", "reason"), LIMITS, ids=str)
def test_limits_are_checked(
    limit: dict[str, Any], reason: str, ab: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=reason):
        hb.compose("a", adapters=ab, out=tmp_path / "x", **limit)


def test_nothing_is_replaced_unasked_and_no_part_ever(ab: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "x"
    hb.compose("a", adapters=ab, out=out)
    with pytest.raises(StorageError, match="exists already"):
        hb.compose("a + b", adapters=ab, out=out)
    hb.compose("a + b", adapters=ab, out=out, replace=True)
    with pytest.raises(UsageError, match="take the place of its own part a"):
        hb.compose("a + b", adapters=ab, out=tmp_path / "y" / ".." / "a", replace=True)
    with pytest.raises(UsageError, match="no adapter 'a'"):
        hb.compose("a", adapters={"b": ab["b"]}, out=out)

"""`halfbyte compose`: what it prints, and how it refuses."""

import json
from pathlib import Path

import pytest

from composition.random_adapters import random_adapter
from halfbyte.adapters.peft_files import read_adapter, write_adapter
from halfbyte.cli.app import run
from halfbyte.cli.compose import parse_adapters
from halfbyte.composition.parser import parse
from halfbyte.errors import UsageError


@pytest.fixture
def bound(tmp_path: Path) -> list[str]:
    arguments = []
    for seed, name in enumerate("ab"):
        write_adapter(random_adapter(seed), tmp_path / name)
        arguments += ["--adapter", f"{name}={tmp_path / name}"]
    return arguments


def test_an_exact_sum(bound: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mix"
    assert run(["compose", "0.5*a - b", *bound, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert f"0.5*a - b -> {out}: 3 layers of rank 8, 1,088 parameters, 4.2 KiB" in captured.out
    assert "exact: nothing was dropped" in captured.out
    assert "known by name only (models/base)" in captured.err
    assert read_adapter(out).num_parameters == 1088


def test_compression_is_reported(
    bound: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mix"
    command = ["compose", "ties(a, b, density=0.5)", *bound, "--out", str(out), "--rank", "3"]
    assert run([*command, "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["expression"] == "svd(ties(a, b, density=0.5), rank=3)"
    assert record["ranks"] == [3]
    (total,) = record["report"]["compressed"]
    assert 0 < total["kept"] < 1
    assert f"{total['kept']:.3%}" in captured.err
    assert "rel. error" in captured.err
    assert run([*command, "--replace", "--fidelity", "0.9"]) == 2


def test_faults_show_their_place(
    bound: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compose", "0.5*a + c", *bound, "--out", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert "  0.5*a + c\n          ^ no adapter 'c'. There are: a, b." in err
    assert run(["compose", "-a", *bound, "--out", str(tmp_path / "x")]) == 2
    assert run(["compose", *bound, "--out", str(tmp_path / "x"), "--", "-a"]) == 0


def test_bindings_are_checked_together() -> None:
    with pytest.raises(UsageError, match="5 problems"):
        parse_adapters(["a", "b=", "ties=x", "1a=x", "c=x", "c=y"])
    assert parse_adapters(["a_1=x=y"]) == {"a_1": Path("x=y")}
    assert parse("a_1", parse_adapters(["a_1=x"]))

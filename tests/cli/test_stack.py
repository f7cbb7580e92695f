"""`halfbyte stack` and `inspect` on stacks."""

import json
from pathlib import Path

import pytest

from adapters.test_stack import make_stack
from halfbyte.adapters.fingerprint import fingerprint_adapter
from halfbyte.adapters.peft_files import read_adapter, write_adapter
from halfbyte.adapters.stack_files import read_stack
from halfbyte.cli import app


@pytest.fixture
def parts(tmp_path: Path) -> list[str]:
    paths = []
    for part in make_stack().parts:
        write_adapter(part.adapter, tmp_path / part.name)
        paths.append(str(tmp_path / part.name))
    return paths


def test_build_drop_and_flatten(
    parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two, three, flat = (str(tmp_path / name) for name in ("two", "three", "flat"))
    assert app.run(["stack", "build", *parts[:2], "--out", two]) == 0
    assert capsys.readouterr().out == f"{two}: sql > tone\n"
    assert app.run(["stack", "build", two, parts[2], "--out", three, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [part["name"] for part in record["parts"]] == ["sql", "tone", "brief"]
    assert app.run(["stack", "flatten", three, "--out", flat]) == 0
    assert "sql > tone > brief as one adapter, rank 4, 11, 13" in capsys.readouterr().out
    expected = fingerprint_adapter(make_stack().flatten())
    assert fingerprint_adapter(read_adapter(flat)) == expected

    for left, out in (("sql > tone", "dropped"), ("sql", "last")):
        source = three if out == "dropped" else str(tmp_path / "dropped")
        assert app.run(["stack", "drop", source, "--out", str(tmp_path / out)]) == 0
        assert capsys.readouterr().out == f"{tmp_path / out}: {left}\n"
    assert read_stack(tmp_path / "dropped").order == "sql > tone"
    assert read_adapter(tmp_path / "last").provenance == make_stack().parts[0].adapter.provenance


def test_another_order_is_refused_with_the_reason(
    parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "wrong"
    assert app.run(["stack", "build", *reversed(parts), "--out", str(out)]) == 3
    text = capsys.readouterr().err
    assert "brief was trained on top of sql" in text
    assert "and would stand on the base alone" in text
    assert not out.exists()
    assert app.run(["stack", "drop", parts[0], "--out", str(out)]) == 1
    assert "stack.json" in capsys.readouterr().err
    assert app.run(["stack", "build", "--out", str(out)]) == 2


def test_inspect_explains_a_stack(
    parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / "adapter"
    assert app.run(["stack", "build", *parts, "--out", str(path)]) == 0
    capsys.readouterr()
    assert app.run(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "a stack of 3 adapters",
        "sql > tone > brief",
        "ab" * 32,
        "rank 7, 672 in 4 tensors",
    ):
        assert expected in text
    assert app.run(["inspect", str(path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["kind"], len(record["parts"])) == ("stack", 3)
    (path.parent / "metrics.jsonl").write_text("")
    assert app.run(["inspect", str(path.parent)]) == 0
    assert "a stack of 3 adapters: sql > tone > brief" in capsys.readouterr().out
    (path / "stack.json").write_text("{}")
    assert app.run(["inspect", str(path)]) == 1
    assert "not a stack: " in capsys.readouterr().err

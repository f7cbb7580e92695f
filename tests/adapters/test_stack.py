"""Stacks: their sum against float64 and PEFT, their order, and hostile records of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.fingerprint import fingerprint_adapter
from halfbyte.adapters.peft_files import read_adapter, write_adapter
from halfbyte.adapters.stack import Stack, StackPart
from halfbyte.adapters.stack_files import load_adapter, load_parts, read_stack, write_stack
from halfbyte.composition.parts import read_parts
from halfbyte.errors import (
    FormatError,
    HalfbyteError,
    MissingFileError,
    StorageError,
    VerificationError,
)

BASE = "ab" * 32
SHAPES = {"layers.0.q_proj": (24, 16), "layers.0.up": (40, 16), "layers.1.q_proj": (24, 16)}


def make_adapter(
    seed: int,
    rank: int,
    paths: list[str],
    below: list[StackPart] | None = None,
    *,
    use_rslora: bool = False,
    base: str | None = BASE,
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LoraUpdate(
            torch.randn(rank, SHAPES[path][1], generator=generator),
            torch.randn(SHAPES[path][0], rank, generator=generator),
            alpha=3.0 + seed,
            use_rslora=use_rslora,
        )
        for path in paths
    }
    provenance: dict[str, object] = {"base": {"path": "models/base", "fingerprint": base}}
    if below is not None:
        provenance["on_top_of"] = [
            {"name": part.name, "fingerprint": part.fingerprint} for part in below
        ]
    return Adapter(modules, "models/base", 0.1, provenance)


def make_stack() -> Stack:
    first = StackPart.of("sql", make_adapter(1, 4, list(SHAPES), []))
    second = make_adapter(2, 7, ["layers.0.q_proj", "layers.0.up"], [first], use_rslora=True)
    parts = [first, StackPart.of("tone", second)]
    parts.append(StackPart.of("brief", make_adapter(3, 2, ["layers.0.up"], parts)))
    return Stack(tuple(parts))


def delta(update: LoraUpdate) -> torch.Tensor:
    return update.scaling * update.b_OR.double() @ update.a_RI.double()


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    stack = make_stack()
    write_stack(stack, tmp_path / "s")
    back = read_stack(tmp_path / "s")
    assert (back.base, back.order) == (BASE, "sql > tone > brief")
    for ours, theirs in zip(stack.parts, back.parts, strict=True):
        assert ours.fingerprint == theirs.fingerprint
        assert ours.adapter.provenance == theirs.adapter.provenance
    with pytest.raises(StorageError, match="exists already"):
        write_stack(stack, tmp_path / "s")


def test_the_fingerprint_is_of_what_is_computed(tmp_path: Path) -> None:
    adapter = make_adapter(1, 4, list(SHAPES))
    write_adapter(adapter, tmp_path / "a", linears=list(SHAPES))
    assert fingerprint_adapter(read_adapter(tmp_path / "a")) == fingerprint_adapter(adapter)
    update = adapter.modules["layers.0.up"]
    same = LoraUpdate(update.a_RI, update.b_OR, update.alpha / 2, use_rslora=True)  # rank 4
    other = LoraUpdate(update.a_RI, update.b_OR, update.alpha + 1)
    for changed, equal in ((same, True), (other, False)):
        modules = {**adapter.modules, "layers.0.up": changed}
        found = fingerprint_adapter(Adapter(modules, "elsewhere"))
        assert (found == fingerprint_adapter(adapter)) is equal


def test_flattening_adds_up_exactly() -> None:
    stack = make_stack()
    flat = stack.flatten()
    assert {path: update.rank for path, update in flat.modules.items()} == {
        "layers.0.q_proj": 11,
        "layers.0.up": 13,
        "layers.1.q_proj": 4,
    }
    for path, update in flat.modules.items():
        parts = [p.adapter.modules[path] for p in stack.parts if path in p.adapter.modules]
        expected = torch.stack([delta(part) for part in parts]).sum(0)
        # One rounding of each element of B, at most 2^-24 of it.
        assert (delta(update) - expected).norm() <= 2**-24 * sum(delta(p).norm() for p in parts)
    provenance = flat.provenance or {}
    assert provenance["base"] == {"path": "models/base", "fingerprint": BASE}
    assert [part["name"] for part in provenance["stack"]] == ["sql", "tone", "brief"]  # type: ignore[attr-defined]


def test_peft_loads_the_parts_and_the_flat_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = torch.nn.Module()
    base.config = {}
    base.prepare_inputs_for_generation = None
    base.layers = torch.nn.ModuleList(
        torch.nn.ModuleDict({"q_proj": torch.nn.Linear(16, 24), "up": torch.nn.Linear(16, 40)})
        for _ in range(2)
    )
    stack = make_stack()
    write_stack(stack, tmp_path / "s", linears=list(SHAPES))
    write_adapter(stack.flatten(), tmp_path / "flat")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "flat", adapter_name="flat")
    folders = ["1-sql", "2-tone", "3-brief"]
    for folder in folders:
        model.load_adapter(tmp_path / "s" / folder, adapter_name=folder)
    for path in SHAPES:
        layer = model.base_model.model.get_submodule(path)
        found = sum(layer.get_delta_weight(f) for f in folders if f in layer.lora_A)
        # float32 sums of at most 13 products in two orders, elements up to 30
        torch.testing.assert_close(layer.get_delta_weight("flat"), found, rtol=1e-5, atol=1e-5)


def test_a_stack_is_an_adapter_and_an_adapter_a_stack(tmp_path: Path) -> None:
    stack = make_stack()
    write_stack(stack, tmp_path / "s")
    whole = load_adapter(tmp_path / "s")
    assert fingerprint_adapter(whole) == fingerprint_adapter(stack.flatten())
    write_adapter(stack.parts[0].adapter, tmp_path / "run" / "adapter")
    single = Stack(load_parts(tmp_path / "run" / "adapter"))
    assert (single.order, single.base) == ("run", BASE)
    assert Stack(load_parts(tmp_path / "s")).order == "sql > tone > brief"


def test_expressions_take_stacks(tmp_path: Path) -> None:
    write_stack(make_stack(), tmp_path / "s")
    parts = read_parts({"s": tmp_path / "s"})
    assert parts["s"].fingerprint == fingerprint_adapter(make_stack().flatten())
    assert parts["s"].base_fingerprint == BASE


def test_the_last_part_can_go_and_no_other() -> None:
    stack = make_stack()
    shorter = stack.without_last()
    assert shorter.order == "sql > tone"
    with pytest.raises(VerificationError, match="at least one adapter"):
        shorter.without_last().without_last()
    sql, tone, brief = stack.parts
    with pytest.raises(VerificationError, match="tone > sql: 2 problems") as caught:
        Stack((tone, sql))
    reason = f"tone was trained on top of sql ({sql.fingerprint[:12]}), and would stand on the base"
    assert reason in str(caught.value)
    assert "sql was trained on top of the base alone, and would stand on tone" in str(caught.value)
    with pytest.raises(VerificationError, match=r"brief was trained on top of sql .* > tone"):
        Stack((sql, brief))


def test_what_says_nothing_is_taken_at_its_word() -> None:
    sql = make_stack().parts[0]
    foreign = StackPart.of("foreign", Adapter(make_adapter(4, 2, ["layers.0.up"]).modules))
    assert Stack((sql, foreign)).base == BASE
    assert Stack((foreign,)).base is None


def test_cycles_and_other_bases_are_all_listed() -> None:
    sql, tone, _ = make_stack().parts
    other = StackPart.of("other", make_adapter(5, 2, ["layers.0.up"], [sql, tone], base="cd" * 32))
    with pytest.raises(VerificationError, match="3 problems") as caught:
        Stack((sql, tone, StackPart("again", sql.adapter, sql.fingerprint), other))
    assert "again is sql again" in str(caught.value)
    assert "other was trained on top of" in str(caught.value)
    with pytest.raises(VerificationError, match="other: trained on base cdcd"):
        Stack((sql, tone, other))


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "stack.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


GOOD = {"name": "sql", "directory": "1-sql", "fingerprint": "0" * 64}
HOSTILE: list[tuple[dict[str, Any], list[str]]] = [
    ({"version": 2}, ["version: 1 expected, found 2"]),
    ({"version": True, "base": 5, "parts": {}}, ["version", "base: 64 hex", "found dict"]),
    ({"parts": []}, ["a list of 1 to 64 expected, found 0"]),
    ({"parts": [GOOD] * 65}, ["found 65"]),
    ({"parts": [GOOD, GOOD]}, ["parts[1].directory: '1-sql' stands in the stack already"]),
    (
        {"parts": [5, {**GOOD, "directory": "../1-sql"}, {**GOOD, "directory": "/etc"}, {}]},
        ["parts[0]: an object", "parts[1].directory: the plain", "parts[2].directory", "parts[3]."],
    ),
    (
        {"parts": [{**GOOD, "name": "\x1b[2J", "fingerprint": [1], "run": "x"}], "auto_map": 1},
        ["parts[0].name", "parts[0].fingerprint", "parts[0].run: unknown", "auto_map: unknown"],
    ),
    ({"parts": [{**GOOD, "directory": "gone"}]}, ["gone: there is no such directory"]),
    ({"parts": [{**GOOD, "directory": "link"}]}, ["link: a link"]),
    ({"parts": [{**GOOD, "directory": "nested"}]}, ["nested: a stack itself"]),
    ({"parts": [{**GOOD, "directory": "empty"}]}, ["empty: no adapter"]),
]


@pytest.mark.parametrize(("changes", "expected"), HOSTILE, ids=lambda x: str(x)[:40])
def test_hostile_records_are_refused_with_all_problems(
    tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    directory = tmp_path / "s"
    write_stack(make_stack(), directory)
    (directory / "link").symlink_to(directory)
    (directory / "empty").mkdir()
    (directory / "nested").mkdir()
    (directory / "nested" / "stack.json").write_text("{}")
    edit(directory, **changes)
    with pytest.raises(FormatError, match="not a stack") as caught:
        read_stack(directory)
    for part in expected:
        assert part in str(caught.value)


def test_a_record_that_is_no_json_is_refused(tmp_path: Path) -> None:
    write_stack(make_stack(), tmp_path / "s")
    for text in ("[]", "{", '{"version": 1, "version": 1}', '{"a":' * 100 + "1" + "}" * 100):
        (tmp_path / "s" / "stack.json").write_text(text)
        with pytest.raises(FormatError):
            read_stack(tmp_path / "s")
    with pytest.raises(MissingFileError):
        read_stack(tmp_path)


def test_parts_that_were_exchanged_or_edited_are_listed(tmp_path: Path) -> None:
    stack = make_stack()
    write_stack(stack, tmp_path / "s")
    parts = json.loads((tmp_path / "s" / "stack.json").read_text())["parts"]
    edit(tmp_path / "s", parts=[parts[1], parts[0], parts[2]])
    with pytest.raises(VerificationError, match="tone was trained on top of sql"):
        read_stack(tmp_path / "s")
    config = tmp_path / "s" / "1-sql" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 400}))
    edit(tmp_path / "s", parts=parts)
    with pytest.raises(VerificationError, match="3 problems") as caught:
        read_stack(tmp_path / "s")
    assert "1-sql: fingerprint" in str(caught.value)
    edit(tmp_path / "s", base="cd" * 32)
    with pytest.raises(
        VerificationError, match=r"base: abab.* expected, as its parts say, found cdcd"
    ):
        read_stack(tmp_path / "s")


def test_parts_that_cannot_be_read_are_all_named(tmp_path: Path) -> None:
    write_stack(make_stack(), tmp_path / "s")
    (tmp_path / "s" / "1-sql" / "adapter_model.safetensors").unlink()
    (tmp_path / "s" / "3-brief" / "adapter_config.json").write_text("{")
    with pytest.raises(FormatError, match="2 problems") as caught:
        read_stack(tmp_path / "s")
    assert "1-sql" in str(caught.value)
    assert "3-brief" in str(caught.value)


@pytest.mark.parametrize("record", [[5], [{"name": [], "fingerprint": None}], [{}]])
def test_provenance_of_strangers_is_compared_not_trusted(record: list[Any]) -> None:
    adapter = make_adapter(1, 4, list(SHAPES))
    strange = Adapter(adapter.modules, provenance={"base": "x", "on_top_of": record})
    with pytest.raises(HalfbyteError, match="was trained on top of"):
        Stack((StackPart.of("a", strange),))

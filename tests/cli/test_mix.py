"""`--adapter` and `--mix` of generate and chat."""

import json
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.peft_files import write_adapter
from halfbyte.cli import app
from halfbyte.cli.mix import name_adapters, parse_mix
from halfbyte.errors import UsageError
from training.tiny_run import make_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mix")
    make_model(path / "model")
    for seed, name in enumerate(("sql", "tone")):
        generator = torch.Generator().manual_seed(seed)
        update = LoraUpdate(
            torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator), 8.0
        )
        write_adapter(Adapter({"model.layers.1.self_attn.o_proj": update}), path / name)
    return path


def test_a_mix_is_what_python_would_use(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: directory / name for name in ("sql", "tone")}
    model = hb.load(directory / "model", adapters=paths)
    bindings = [part for n, p in paths.items() for part in ("--adapter", f"{n}={p}")]
    command = ["generate", str(directory / "model"), "--max-new-tokens", "8", *bindings]

    model.use({"sql": 0.7, "tone": -3.0})
    assert app.run([*command, "--mix", "0.7*sql - 3*tone", "the cat"]) == 0
    expected = model.generate("the cat", max_new_tokens=8)
    assert capsys.readouterr().out == expected + "\n"

    mixes = ["sql", "2*tone"]
    each = [part for mix in mixes for part in ("--mix", mix)]
    assert app.run([*command, *each, "--json", "the cat", "you"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()][:2]
    texts = model.generate(["the cat", "you"], adapters=["sql", {"tone": 2.0}], max_new_tokens=8)
    assert [record["text"] for record in found] == texts

    chat = ["chat", str(directory / "model"), *bindings, "--max-new-tokens", "8", "--json"]
    model.use("tone")
    assert app.run([*chat, "--mix", "tone", "--message", "the cat"]) == 0
    turn = model.chat([{"role": "user", "content": "the cat"}], max_new_tokens=8)
    assert json.loads(capsys.readouterr().out)["text"] == "".join(piece.text for piece in turn)


def test_what_cannot_be_mixed_is_refused_before_the_model_is_opened(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["generate", "no/model", "the", "--adapter", "a=no/a", "--adapter", "b=no/b"]
    for mix, message in (
        ("0.5*a + c", "no adapter 'c'"),
        ("svd(a, rank=2) + b", "found svd(a, rank=2)"),
        ("a > b", "found a > b"),
    ):
        assert app.run([*command, "--mix", mix]) == 2
        assert message in capsys.readouterr().err
    assert app.run([*command, "you", "cat", "--mix", "a", "--mix", "b"]) == 2
    assert "--mix: one, or one a prompt (3), expected; found 2" in capsys.readouterr().err


def test_paths_are_names_where_none_is_given(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    found = name_adapters(["runs/a", "sql=runs/sql", str(odd)])
    assert found == {"runs/a": Path("runs/a"), str(odd): odd, "sql": Path("runs/sql")}
    assert name_adapters(None) == {}
    assert parse_mix("a - 2*(a + b)", ["a", "b"]) == {"a": -1.0, "b": -2.0}
    with pytest.raises(UsageError, match="each once"):
        name_adapters(["runs/a", "runs/a"])
    with pytest.raises(UsageError, match="a name of letters"):
        name_adapters(["1x=runs/a"])

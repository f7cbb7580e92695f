"""Checkpoints are whole, checked, and never all lost."""

import random
import shutil
from pathlib import Path

import pytest
import torch

from halfbyte.errors import FormatError, VerificationError
from halfbyte.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    newest_valid,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step,
        {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator)},
        {"a.exp_avg": torch.randn(3, 5, generator=generator), "step": torch.tensor(step)},
        {"position": {"epoch": 1, "row": step}, "loss_scale": 2.0**16},
    )


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    original = checkpoint(12)
    back = read_checkpoint(write_checkpoint(tmp_path, original))
    assert back.step == 12
    assert dict(back.state) == {"step": 12, **original.state}
    for ours, theirs in ((original.trained, back.trained), (original.optimizer, back.optimizer)):
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    for run in ("x", "y"):
        write_checkpoint(tmp_path / run, checkpoint(3))
    files = [sorted((tmp_path / run).rglob("*.*")) for run in ("x", "y")]
    assert len(files[0]) == 4
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_the_newest_valid_is_found_and_the_others_named(tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path, checkpoint(step)) for step in (5, 10, 15)]
    (paths[2] / "trained.safetensors").write_bytes(b"")
    (paths[1] / "MANIFEST.json").unlink()
    found, skipped = newest_valid(tmp_path)
    assert found is not None
    assert found.step == 5
    assert [entry.path for entry in skipped] == [paths[2], paths[1]]
    assert "trained.safetensors" in skipped[0].reason
    assert "MANIFEST.json" in skipped[1].reason


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) == (None, [])


def test_a_renamed_checkpoint_is_not_believed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, checkpoint(5))
    with pytest.raises(FormatError, match="step"):
        read_checkpoint(path.rename(path.with_name("step-000006")))


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 1000000):
        write_checkpoint(tmp_path, checkpoint(step))
    assert len(prune_checkpoints(tmp_path, 2)) == 2
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003", "step-1000000"]
    assert prune_checkpoints(tmp_path, 2) == []


def test_pruning_keeps_everything_while_the_newest_is_damaged(tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path, checkpoint(step)) for step in (1, 2, 3)]
    (paths[-1] / "state.json").write_text("{}")
    assert prune_checkpoints(tmp_path, 1) == []
    assert list_checkpoints(tmp_path) == paths


def damage(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    if rng.random() < 0.5:
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        what = f"bit flip in {file.name} at {place}"
    else:
        place = rng.randrange(len(content))
        del content[place:]
        what = f"{file.name} cut at {place}"
    file.write_bytes(content)
    return what


def refuses(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except (VerificationError, FormatError):
        return True
    return False


def test_every_bit_flip_and_truncation_is_detected(tmp_path: Path) -> None:
    rng = random.Random(0)  # noqa: S311  (damage needs no cryptography)
    older = write_checkpoint(tmp_path, checkpoint(1))
    newer = write_checkpoint(tmp_path, checkpoint(2))
    pristine = shutil.copytree(newer, tmp_path / "pristine")
    for _ in range(500):
        what = damage(newer, rng)
        assert refuses(newer), f"undetected: {what}"
        found, skipped = newest_valid(tmp_path)
        assert found is not None
        assert found.step == 1
        assert [entry.path for entry in skipped] == [newer]
        shutil.rmtree(newer)
        shutil.copytree(pristine, newer)
    assert read_checkpoint(older).step == 1

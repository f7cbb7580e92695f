"""Records survive resumes exactly once."""

from pathlib import Path

import pytest

from halfbyte.errors import FormatError
from halfbyte.training.metrics import RecordFile, read_records


def write(directory: Path, steps: range, resume_step: int = 0) -> None:
    metrics = RecordFile(directory / "metrics.jsonl", resume_step=resume_step)
    for step in steps:
        metrics.append({"step": step, "loss": 1 / step})
    metrics.close()


def steps(directory: Path) -> list[object]:
    return [record["step"] for record in read_records(directory / "metrics.jsonl")]


def test_records_read_back(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    assert list(read_records(tmp_path / "metrics.jsonl"))[1] == {"step": 2, "loss": 0.5}


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, range(1, 10))
    write(tmp_path, range(5, 8), resume_step=4)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert steps(tmp_path) == [1, 2]
    write(tmp_path, range(3, 5), resume_step=2)
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"step": "1"}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    write(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{line}\n" + path.read_text())
    with pytest.raises(FormatError, match=r"metrics\.jsonl:1"):
        steps(tmp_path)


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert steps(tmp_path) == []

"""What a probe measures in a process of its own."""

from pathlib import Path

import pytest

from halfbyte.training.probe import NUM_WARM, schedule
from halfbyte.training.probe_report import ProbeRequest
from halfbyte.training.probing import run_probe
from halfbyte.training.shapes import MicroBatchShape
from training.tiny_run import make_config, make_model


def make_request(directory: Path, recompute: int = 0, dtype: str = "fp32") -> ProbeRequest:
    config = make_config(directory, f"training.compute_dtype={dtype}")
    shapes = (MicroBatchShape((192,), 20), MicroBatchShape((384,), 40))
    return ProbeRequest(
        config,
        shapes,
        (recompute,),
        accumulate=False,
        evaluate=False,
        num_threads=2,
        directory=directory,
    )


def test_no_step_takes_more_than_those_asked_for(tmp_path: Path) -> None:
    request = make_request(tmp_path, recompute=2)
    steps = schedule(request)
    assert steps[NUM_WARM:] == [(shape, 2) for shape in request.shapes]
    assert [(shape.num_tokens, layers) for shape, layers in steps[:NUM_WARM]] == [(32, 2), (384, 2)]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_larger_step_adds_no_workspaces(tmp_path: Path, dtype: str) -> None:
    """They are permanent; taken for a part of what tokens need, they would grow with those."""
    vocabulary, hidden = 65_536, 128  # the head in float32 is 34 MB
    make_model(tmp_path / "model-4bit", vocab_size=vocabulary, hidden_size=hidden)
    small, large = run_probe(make_request(tmp_path, dtype=dtype)).steps
    # Two layers that keep less than 60 values a token and feature, in float32: 12 MB.
    assert 0 < large.kept - small.kept < 2 * 192 * 60 * 4 * hidden

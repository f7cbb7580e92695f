"""What a probe measures in a process of its own."""

from pathlib import Path

import pytest

from halfbyte.training.probe_report import ProbeRequest
from halfbyte.training.probing import run_probe
from halfbyte.training.shapes import MicroBatchShape
from training.tiny_run import make_config, make_model

MB = 10**6


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_larger_step_adds_no_workspaces(tmp_path: Path, dtype: str) -> None:
    """They are permanent; taken for a part of what tokens need, they would grow with those."""
    vocabulary, hidden = 65_536, 128  # the head in float32 is 34 MB
    settings = {"hidden_size": hidden, "tie_word_embeddings": True}
    make_model(tmp_path / "model-4bit", vocab_size=vocabulary, **settings)
    config = make_config(tmp_path, f"training.compute_dtype={dtype}")
    shapes = (MicroBatchShape((192,), 20), MicroBatchShape((384,), 40))
    request = ProbeRequest(
        config, shapes, (0,), accumulate=False, evaluate=False, num_threads=2, directory=tmp_path
    )
    small, large = run_probe(request).steps
    # Two layers that keep less than 60 values a token and feature, in float32: 12 MB.
    assert 0 < large.kept - small.kept < 2 * 192 * 60 * 4 * hidden

"""Merging takes memory for what it looks at, and not for what it has looked at before."""

from pathlib import Path

import pytest
from benchmarks.merge_memory import CONFIG, measure, write_inputs

NARROW = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


@pytest.mark.slow
def test_logits_that_were_compared_are_given_back(tmp_path: Path) -> None:
    write_inputs(tmp_path, CONFIG | NARROW)
    # Twice the head in float32 [32000, 256], for the live model and the merged one, and eight
    # blocks of 128 rows of logits: a kernel's result beside its arguments, for both. The rest is
    # modules that merging imports; without giving back, the peak is 1.5 GB.
    logits = 2 * 4 * 32_000 * 256 + 8 * 4 * 128 * 32_000
    assert measure(tmp_path, "bf16").above <= logits + 100 * 2**20

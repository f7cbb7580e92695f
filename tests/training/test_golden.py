"""The losses of a few steps, written down: no kernel may change what is learned.

Made with PyTorch's attention, norms and activations, and its products of the dequantized weights.
"""

from pathlib import Path

import pytest

from halfbyte.kernels import backends
from halfbyte.training.metrics import read_records
from halfbyte.training.run import train
from training.tiny_run import make_config

LOSSES = {
    "qlora": [7.606785507, 5.733412087, 4.121453339, 3.411264764, 2.630700069, 2.188851107],
    "lora": [7.750103738, 5.876641981, 4.438495132, 3.699980314, 2.765684213, 2.395427528],
}
NORMS = {
    "qlora": [9.268054962, 6.185647488, 7.700192451, 6.046035767, 5.661015987, 5.374989033],
    "lora": [9.825961113, 6.367505074, 6.777216911, 6.027860641, 4.920546055, 4.496406078],
}


@pytest.mark.parametrize("isa", ["avx512bf16", "avx2", "portable"])
@pytest.mark.parametrize("method", LOSSES)
def test_losses_are_those_that_were_written_down(tmp_path: Path, method: str, isa: str) -> None:
    if isa not in backends.cpu_isas():
        pytest.skip(f"{isa} cannot run here: {backends.status()[0].reason}")
    config = make_config(tmp_path, "training.max_steps=6", f"training.method={method}")
    with backends.cpu_isa_forced(isa):
        train(config)
    steps = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    # float32 sums of a few hundred terms in other orders: 1e-6. AdamW divides by the size of each
    # gradient, so small gradients carry their relative errors into the steps that follow.
    assert [step["loss"] for step in steps] == pytest.approx(LOSSES[method], rel=1e-5)
    assert [step["grad_norm"] for step in steps] == pytest.approx(NORMS[method], rel=1e-4)

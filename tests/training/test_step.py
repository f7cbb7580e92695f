"""A step's loss and gradients do not depend on how the step is cut, packed or recomputed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from halfbyte.data.batch import build_batch
from halfbyte.layers.cross_entropy import linear_cross_entropy
from halfbyte.optim.accumulators import ResidentAccumulator
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.training.methods import TrainedModel, attach_trained, open_base
from halfbyte.training.run_data import RunData, open_run_data
from halfbyte.training.step import Gradients, compute_gradients
from training.tiny_run import make_config

# float32 sums of at most a few hundred terms in other orders, through two layers, relative to the
# largest gradient of each factor.
TOLERANCE = 2e-5

DOCUMENTS = list(range(8))


def opened(tmp_path: Path, *assignments: str) -> tuple[TrainedModel, RunData]:
    config = make_config(tmp_path, *assignments)
    model = attach_trained(open_base(config), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # B starts at zero, which would hide the gradients of A
        for name, parameter in model.parameters.items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05, generator=generator)
    return model, open_run_data(config, Tokenizer.load(config.model))


def gradients_of(
    model: TrainedModel, data: RunData, cuts: list[list[int]], **options: float | None
) -> tuple[Gradients, dict[str, Tensor]]:
    batches = [build_batch(data.train, documents) for documents in cuts]
    accumulator = ResidentAccumulator(list(model.parameters.values()))
    found = compute_gradients(model.decoder, batches, accumulator, **options)  # type: ignore[arg-type]
    gradients = {name: p.grad.clone() for name, p in model.parameters.items() if p.grad is not None}
    assert set(gradients) == set(model.parameters)
    return found, gradients


def assert_same(
    one: tuple[Gradients, dict[str, Tensor]], other: tuple[Gradients, dict[str, Tensor]]
) -> None:
    assert one[0].loss == pytest.approx(other[0].loss, rel=1e-6)
    assert one[0].norm == pytest.approx(other[0].norm, rel=1e-4)
    assert one[0].num_targets == other[0].num_targets
    for name, gradient in one[1].items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (gradient - other[1][name]).abs().max() <= TOLERANCE * scale, name


def test_accumulating_equals_one_large_batch(tmp_path: Path) -> None:
    model, data = opened(tmp_path)
    whole = gradients_of(model, data, [DOCUMENTS])
    assert_same(gradients_of(model, data, [[d] for d in DOCUMENTS]), whole)
    assert_same(gradients_of(model, data, [DOCUMENTS[:5], DOCUMENTS[5:]]), whole)


def test_packing_equals_documents_alone(tmp_path: Path) -> None:
    """The loss of a pack is the sum of the losses of its documents."""
    model, data = opened(tmp_path)
    whole, _ = gradients_of(model, data, [DOCUMENTS])
    alone = [gradients_of(model, data, [[document]])[0] for document in DOCUMENTS]
    total = sum(found.loss * found.num_targets for found in alone)
    assert whole.loss == pytest.approx(total / whole.num_targets, rel=1e-6)


@pytest.mark.parametrize("recompute", [1, 2])
def test_recomputing_changes_no_bit(tmp_path: Path, recompute: int) -> None:
    model, data = opened(tmp_path, "lora.dropout=0.3")
    plain = gradients_of(model, data, [DOCUMENTS], dropout_seed=3)
    again = gradients_of(model, data, [DOCUMENTS], dropout_seed=3, recompute=recompute)
    assert plain[0] == again[0]
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, again[1][name])


def test_dropout_follows_its_seed(tmp_path: Path) -> None:
    model, data = opened(tmp_path, "lora.dropout=0.3")
    losses = [gradients_of(model, data, [DOCUMENTS], dropout_seed=s)[0].loss for s in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]
    assert gradients_of(model, data, [DOCUMENTS])[0].loss not in losses


def test_the_chunked_loss_equals_the_whole(tmp_path: Path) -> None:
    model, data = opened(tmp_path)
    batch = build_batch(data.train, DOCUMENTS)
    rows = (batch.targets != -100).nonzero()[:, 0]
    features = model.decoder(batch.tokens, batch.segments, rows=rows).detach().requires_grad_()
    found = []
    for chunk_rows in (1, 7, len(rows)):
        loss = linear_cross_entropy(
            features, batch.targets[rows], model.decoder.head, chunk_rows=chunk_rows
        )
        (gradient,) = torch.autograd.grad(loss, features)
        found.append((loss.item(), gradient))
    for loss_value, gradient in found[:2]:
        assert loss_value == pytest.approx(found[2][0], rel=1e-6)
        assert (gradient - found[2][1]).abs().max() <= TOLERANCE * found[2][1].abs().max()


def test_loss_scaling_changes_no_bit_in_float32(tmp_path: Path) -> None:
    model, data = opened(tmp_path)
    plain = gradients_of(model, data, [DOCUMENTS])
    scaled = gradients_of(model, data, [DOCUMENTS], loss_scale=2.0**10)
    assert_same(scaled, plain)


def test_clipping_scales_to_the_limit(tmp_path: Path) -> None:
    model, data = opened(tmp_path)
    whole, gradients = gradients_of(model, data, [DOCUMENTS])
    limit = whole.norm / 3
    clipped, smaller = gradients_of(model, data, [DOCUMENTS], max_norm=limit)
    assert clipped.norm == whole.norm
    for name, gradient in gradients.items():
        torch.testing.assert_close(smaller[name], gradient / 3, rtol=1e-5, atol=0)


def test_the_loss_is_that_of_pytorch(tmp_path: Path) -> None:
    model, data = opened(tmp_path)
    found, _ = gradients_of(model, data, [DOCUMENTS[:3], DOCUMENTS[3:]])
    batch = build_batch(data.train, DOCUMENTS)
    logits = model.decoder.logits(batch.tokens, batch.segments)
    expected = torch.nn.functional.cross_entropy(logits.float(), batch.targets)
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_small_step_downhill_lowers_the_loss(tmp_path: Path, method: str) -> None:
    model, data = opened(tmp_path, f"training.method={method}")
    before, gradients = gradients_of(model, data, [DOCUMENTS])
    rate = 1e-3 / before.norm
    with torch.no_grad():
        for name, parameter in model.parameters.items():
            parameter.sub_(rate * gradients[name])
    model.refresh()
    after, _ = gradients_of(model, data, [DOCUMENTS])
    # A step of length 1e-3 against a gradient of this norm; curvature may take a third of it.
    assert after.loss < before.loss - 1e-3 * before.norm * 0.66

"""Weights found by search: the gradient, the mixes that are found, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from composition.random_adapters import random_adapter
from halfbyte.adapters.peft_files import read_adapter, write_adapter
from halfbyte.cli.app import run
from halfbyte.composition import search as module
from halfbyte.composition.mix_loss import MixLoss
from halfbyte.composition.search import Candidate, choose_candidate, choose_examples, find_weights
from halfbyte.data.batch import evaluation_batches
from halfbyte.data.dataset import Dataset
from halfbyte.data.read import load_dataset
from halfbyte.errors import DataError, TrainingError, UsageError
from halfbyte.generation.adapters import attach_adapters
from halfbyte.layers.segments import pack
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import load_decoder
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.training.config import DataSection
from halfbyte.training.data_options import data_options
from training.tiny_run import make_data, make_model

TRUE = {"a": 0.8, "b": -0.5}
"""The mix that wrote the examples."""
VOCABULARY = 300
"""Tokens that both the tokenizer and the model have."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    linears = {
        path: (linear.out_features, linear.in_features)
        for path, linear in load_decoder(model).linears.items()
    }
    directory = tmp_path_factory.mktemp("adapters")
    write_adapter(random_adapter(1, 4, 2.0, features=linears), directory / "a")
    first = {path: shape for path, shape in linears.items() if "layers.0" in path}
    write_adapter(random_adapter(2, 8, 4.0, features=first), directory / "b")
    return {name: directory / name for name in "ab"}


@pytest.fixture(scope="module")
def decoder(model: Path, adapters: dict[str, Path]) -> Decoder:
    decoder = load_decoder(model, compute_dtype=torch.float32)
    attach_adapters(decoder, adapters)
    return decoder


def read(path: Path, model: Path) -> Dataset:
    options = data_options(DataSection(train=str(path)))
    return load_dataset(path, Tokenizer.load(model), options).dataset


@pytest.fixture(scope="module")
def examples(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens drawn from the model with the true mix, one prompt each."""
    decoder.mixes = (tuple(TRUE.items()),)
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[10 + number, 40, 50] for number in range(24)])
    for _ in range(40):
        count, length = ids.shape
        ends = torch.arange(1, count + 1) * length - 1
        logits = decoder.logits(ids.flatten(), pack([length] * count), rows=ends)
        probabilities = logits[:, :VOCABULARY].softmax(dim=-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    rows = [{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in ids.tolist()]
    path = tmp_path_factory.mktemp("data") / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def losses(decoder: Decoder, model: Path, examples: Path) -> MixLoss:
    return MixLoss(decoder, ("a", "b"), list(evaluation_batches(read(examples, model), 300)))


@pytest.mark.parametrize("at", [(0.5, 0.5), (-1.0, 0.0)])
def test_the_gradient_is_that_of_the_loss(losses: MixLoss, at: tuple[float, float]) -> None:
    loss, gradient = losses.gradient(torch.tensor(at))
    weights = dict(zip("ab", at, strict=True))
    assert loss == pytest.approx(losses.value(weights), rel=1e-5)
    for index, name in enumerate("ab"):

        def slope(step: float, name: str = name) -> float:
            """Central difference: the error falls with step^2."""
            above, below = (
                losses.value(weights | {name: weights[name] + s}) for s in (step, -step)
            )
            return (above - below) / (2 * step)

        expected = (4 * slope(5e-3) - slope(1e-2)) / 3
        # Richardson leaves step^4; float32 losses of 6 nats are known to 1e-6, over 5e-3.
        assert gradient[index].item() == pytest.approx(expected, abs=5e-4)


def test_banks_are_put_back(losses: MixLoss, decoder: Decoder) -> None:
    before = {path: dict(linear.bank) for path, linear in decoder.linears.items()}
    losses.gradient(torch.tensor([0.3, 0.4]))
    for path, linear in decoder.linears.items():
        assert linear.bank == before[path]


def test_the_mix_that_wrote_the_examples_is_found(
    model: Path, adapters: dict[str, Path], examples: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    made = hb.compose(
        adapters=adapters, search=examples, model=model, out=tmp_path / "mix", told=said.append
    )
    found = made.found
    assert found is not None
    assert found.chosen.label == "found mix"
    for name, weight in TRUE.items():
        # 12 x 40 drawn tokens determine a weight to about a tenth.
        assert found.chosen.weights[name] == pytest.approx(weight, abs=0.2)
    by_label = {candidate.label: candidate for candidate in found.candidates}
    assert list(by_label) == ["found mix", "a", "b", "uniform mix", "base alone"]
    for other in ("a", "b", "uniform mix", "base alone"):
        assert found.chosen.held_out_loss < by_label[other].held_out_loss
        assert found.chosen.search_loss < by_label[other].search_loss
    assert found.num_search + found.num_held_out == 24
    assert found.num_gradients == sum(line.startswith("step") for line in said) <= 40
    record = read_adapter(made.path).provenance
    assert record is not None
    composition = record["composition"]
    assert isinstance(composition, dict)
    assert composition["expression"] == made.expression
    assert composition["search"]["chosen"] == "found mix"
    assert composition["parts"]["a"]["weight"] == found.chosen.weights["a"]


def candidate(label: str, held_out: float, **weights: float) -> Candidate:
    return Candidate(label, weights, 1.0, held_out)


def test_what_is_worse_on_held_out_examples_is_not_taken() -> None:
    found = candidate("found mix", 1.5, a=0.9, b=0.4)
    others = [candidate("a", 1.2, a=1.0), candidate("uniform mix", 1.3, a=0.5, b=0.5)]
    base = candidate("base alone", 1.1)
    chosen, remarks = choose_candidate((found, *others, base))
    assert chosen.label == "a"
    assert "worse on held-out examples (loss 1.5000) than a (1.2000)" in remarks[0]
    assert "the base without any adapter is better" in remarks[1]
    even = candidate("found mix", 1.2, a=0.9, b=0.4)
    assert choose_candidate((even, *others, candidate("base alone", 2.0))) == (even, ())
    zero = candidate("found mix", 1.0, a=0.0, b=0.0)
    assert choose_candidate((zero, *others, base))[0].label == "a"


def test_a_search_that_goes_astray_falls_back(
    model: Path,
    adapters: dict[str, Path],
    examples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "_descend", lambda *_: ({"a": 3.0, "b": 3.0}, 1))
    arguments = [f"--adapter={name}={path}" for name, path in adapters.items()]
    command = ["compose", "--search", str(examples), "--model", str(model), *arguments]
    assert run([*command, "--out", str(tmp_path / "mix"), "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    losses = {c["label"]: c["held_out_loss"] for c in record["search"]["candidates"]}
    assert record["search"]["chosen"] == min(("a", "b", "uniform mix"), key=losses.__getitem__)
    assert "note: the weights found are worse on held-out examples" in captured.err
    assert f"{record['search']['chosen']} *" in captured.err


def test_a_step_to_infinity_ends_the_descent(
    losses: MixLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradient(_: MixLoss, weights: torch.Tensor) -> tuple[float, torch.Tensor]:
        far = bool((weights > 0.6).any())
        return (float("nan") if far else 1.0 - weights.sum().item()), -torch.ones(2)

    monkeypatch.setattr(MixLoss, "gradient", gradient)
    said: list[str] = []
    found, count = module._descend(losses, {"a": 0.5, "b": 0.5}, said.append)
    assert (found, count) == ({"a": 0.5, "b": 0.5}, 1)
    assert "not finite" in said[-1]
    with pytest.raises(TrainingError, match="not finite"):
        module._descend(losses, {"a": 0.7}, said.append)


def test_the_number_of_examples_is_minded(
    model: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_GRADIENTS", 1)
    many, notes = choose_examples(read(make_data(tmp_path / "many.jsonl", 70), model))
    assert (len(many), many.index[0], many.index[-1]) == (64, 0, 69)
    assert len(set(many.index)) == 64
    assert notes == ("64 of 70 examples were used, evenly spaced",)
    enough = read(make_data(tmp_path / "enough.jsonl", 16), model)
    assert choose_examples(enough) == (enough, ())
    few = find_weights(model, {"a": adapters["a"]}, make_data(tmp_path / "few.jsonl", 6))
    assert any(note.startswith("6 examples are few") for note in few.notes)
    assert [c.label for c in few.candidates] == ["found mix", "a", "base alone"]
    with pytest.raises(DataError, match="two different prompts"):
        find_weights(model, adapters, make_data(tmp_path / "one.jsonl", 1))


def test_an_expression_or_a_search(adapters: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "x"
    for arguments in ({}, {"expression": "a", "search": "x", "model": "y"}, {"search": "x"}, {"expression": "a", "model": "y"}):  # fmt: skip
        with pytest.raises(UsageError, match="an expression, or search and model together"):
            hb.compose(adapters=adapters, out=out, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least one expected"):
        hb.compose("a", adapters={}, out=out)
    with pytest.raises(UsageError, match="empty"):
        hb.compose("", adapters=adapters, out=out)
    assert not out.exists()

"""Weights of a mix, found on a few examples and checked on others.

Cross-entropy has no closed form in the weights, but its gradient is cheap (see `mix_loss`) and the
problem has as many unknowns as there are adapters. So L-BFGS with a line search walks downhill from
the best of the uniform mix and the single adapters: some ten to thirty gradients, where sampling
methods such as CMA-ES need hundreds of losses for a few unknowns.

Half of the examples are held out. What was found has to beat every simple mix there, or the best of
those is taken instead.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halfbyte.composition.mix_loss import MixLoss
from halfbyte.data.batch import Batch, evaluation_batches
from halfbyte.data.dataset import Dataset, split_by_prompt
from halfbyte.data.read import load_dataset
from halfbyte.errors import DataError, TrainingError
from halfbyte.generation.adapters import attach_adapters
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import load_decoder
from halfbyte.models.record import recorded_fingerprint
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.training.config import DataSection
from halfbyte.training.data_options import data_options

MAX_EXAMPLES = 64
FEW_EXAMPLES = 16
MAX_GRADIENTS = 40
"""Of one search; it ends before where the loss stops falling."""
DECIMALS = 4
"""Of a weight that was found: what is checked is what is written."""
_BATCH_TOKENS = 1024
_FOUND, _UNIFORM, _BASE = "found mix", "uniform mix", "base alone"
"""Labels that no adapter can have as its name in an expression."""

Told = Callable[[str], None]
"""Takes a line on what is going on."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mix and its losses, mean over targets in nats.

    Attributes:
        label: `found mix`, `uniform mix`, `base alone`, or the name of a single adapter.
        weights: Adapter -> weight.
        search_loss: On the examples that the search saw.
        held_out_loss: On the others.
    """

    label: str
    weights: Mapping[str, float]
    search_loss: float
    held_out_loss: float


@dataclass(frozen=True, slots=True)
class FoundWeights:
    """How a search ended.

    Attributes:
        chosen: The candidate with the lowest held-out loss, the base alone left out.
        candidates: All, the found one first.
        num_search: Examples that the search saw.
        num_held_out: Examples that it did not see.
        num_gradients: That it took.
        data: Fingerprint of the examples.
        notes: What a user should know, a sentence each.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    num_search: int
    num_held_out: int
    num_gradients: int
    data: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """As provenance keeps it."""
        return {
            "chosen": self.chosen.label,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "num_search": self.num_search,
            "num_held_out": self.num_held_out,
            "num_gradients": self.num_gradients,
            "data": self.data,
        }


def find_weights(
    model: str | Path,
    adapters: Mapping[str, Path],
    data: str | Path,
    *,
    told: Told | None = None,
) -> FoundWeights:
    """Find the weights of a mix that predict some examples best.

    Args:
        model: The base, a model directory. Products run in float32.
        adapters: Name -> directory.
        data: Examples in any form that training reads; at most 64 of them are used.
        told: Told of every step.

    Raises:
        HalfbyteError: Model, adapters or data cannot be used, or do not fit each other.
        TrainingError: The loss is not finite.
    """
    decoder = load_decoder(model, compute_dtype=torch.float32)
    attach_adapters(decoder, adapters, base=recorded_fingerprint(Path(model)))
    options = data_options(DataSection(train=str(data)))
    reading = load_dataset(data, Tokenizer.load(Path(model)), options)
    dataset, notes = choose_examples(reading.dataset)
    if len(np.unique(dataset.store.prompt_digests[dataset.index])) < 2:  # noqa: PLR2004
        raise DataError(f"{data}: two different prompts at least expected: half is held out")
    search, held_out = split_by_prompt(dataset, 0.5)
    return search_weights(decoder, tuple(adapters), search, held_out, notes=notes, told=told)


def choose_examples(dataset: Dataset) -> tuple[Dataset, tuple[str, ...]]:
    """At most 64 examples, evenly spaced, and what there is to say about their number."""
    count = len(dataset)
    if count < FEW_EXAMPLES:
        return dataset, (f"{count} examples are few: {FEW_EXAMPLES} to {MAX_EXAMPLES} are better",)
    if count <= MAX_EXAMPLES:
        return dataset, ()
    rows = np.linspace(0, count - 1, MAX_EXAMPLES).round().astype(np.int64)
    note = f"{MAX_EXAMPLES} of {count} examples were used, evenly spaced"
    return Dataset(dataset.store, dataset.index[rows]), (note,)


def search_weights(
    decoder: Decoder,
    names: tuple[str, ...],
    search: Dataset,
    held_out: Dataset,
    *,
    notes: tuple[str, ...] = (),
    told: Told | None = None,
) -> FoundWeights:
    """`find_weights` for adapters that are in the banks of a decoder, and data that is divided."""
    tell = told or (lambda _: None)
    losses = MixLoss(decoder, names, _batches(search))
    checks = MixLoss(decoder, names, _batches(held_out))
    simple = {name: {name: 1.0} for name in names}
    if len(names) > 1:
        simple[_UNIFORM] = dict.fromkeys(names, round(1 / len(names), DECIMALS))
    simple[_BASE] = {}
    before = {label: losses.value(weights) for label, weights in simple.items()}
    for label, loss in before.items():
        tell(f"{label}: loss {loss:.4f}")
    begin = min((label for label in simple if label != _BASE), key=before.__getitem__)
    found, num_gradients = _descend(losses, simple[begin], tell)
    mixes = {_FOUND: found, **simple}
    candidates = tuple(
        Candidate(label, weights, losses.value(weights), checks.value(weights))
        for label, weights in mixes.items()
    )
    chosen, remarks = choose_candidate(candidates)
    return FoundWeights(
        chosen,
        candidates,
        len(search),
        len(held_out),
        num_gradients,
        search.fingerprint,
        (*notes, *remarks),
    )


def choose_candidate(candidates: tuple[Candidate, ...]) -> tuple[Candidate, tuple[str, ...]]:
    """The best on held-out examples, and what there is to say about it.

    The first of equals is taken: the found one comes first. The base alone is no adapter, and
    neither is a mix whose weights are all zero.
    """
    eligible = [candidate for candidate in candidates if any(candidate.weights.values())]
    chosen = min(eligible, key=lambda candidate: candidate.held_out_loss)
    remarks = []
    found = candidates[0]
    if chosen is not found:
        remarks.append(
            f"the weights found are worse on held-out examples (loss {found.held_out_loss:.4f}) "
            f"than {chosen.label} ({chosen.held_out_loss:.4f}), which is taken instead"
        )
    base = next(candidate for candidate in candidates if candidate.label == _BASE)
    if base.held_out_loss < chosen.held_out_loss:
        remarks.append(
            f"the base without any adapter is better on held-out examples "
            f"(loss {base.held_out_loss:.4f}) than every mix ({chosen.held_out_loss:.4f})"
        )
    return chosen, tuple(remarks)


def _descend(
    losses: MixLoss, begin: Mapping[str, float], tell: Told
) -> tuple[dict[str, float], int]:
    """The best weights met, rounded, and how many gradients were taken."""
    weights_N = torch.tensor([begin.get(name, 0.0) for name in losses.names], requires_grad=True)
    # One iteration ends below a gradient of 1e-4 nats, or when a step or the loss changes by 1e-5.
    optimizer = torch.optim.LBFGS(
        [weights_N],
        max_iter=MAX_GRADIENTS,
        max_eval=MAX_GRADIENTS,
        tolerance_grad=1e-4,
        tolerance_change=1e-5,
        line_search_fn="strong_wolfe",
    )
    visited: list[tuple[float, Tensor]] = []

    def closure() -> Tensor:
        loss, gradient_N = losses.gradient(weights_N)
        if not np.isfinite(loss):
            raise _NotFinite
        weights_N.grad = gradient_N
        visited.append((loss, weights_N.detach().clone()))
        shown = ", ".join(f"{n} {w:.3f}" for n, w in zip(losses.names, weights_N, strict=True))
        tell(f"step {len(visited)}: loss {loss:.4f} with {shown}")
        return torch.tensor(loss)

    try:
        optimizer.step(closure)
    except _NotFinite:
        if not visited:
            raise TrainingError(f"the loss of the mix {dict(begin)} is not finite") from None
        tell("stepped too far: the loss was not finite, and the best mix so far is taken")
    _, best_N = min(visited, key=lambda visit: visit[0])
    found = {n: round(w, DECIMALS) for n, w in zip(losses.names, best_N.tolist(), strict=True)}
    return found, len(visited)


class _NotFinite(Exception):  # noqa: N818  (it ends a descent, and is no error)
    """A step went where the loss is no number."""


def _batches(dataset: Dataset) -> list[Batch]:
    longest = int(dataset.lengths.max())
    return list(evaluation_batches(dataset, max(_BATCH_TOKENS, longest)))

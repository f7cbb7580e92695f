"""Training with a paged optimizer: the same bits under any budget, and no harm when a disk fails."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from halfbyte.data.batch import Batch
from halfbyte.errors import ConfigError, StorageError, UsageError
from halfbyte.kernels import activations, backends
from halfbyte.layers.segments import pack
from halfbyte.memory.layout import Item
from halfbyte.memory.resident import PeakSampler
from halfbyte.optim.factory import make_optimizer
from halfbyte.optim.optimizer import StatefulOptimizer
from halfbyte.optim.optimizers import AdamW
from halfbyte.optim.stores import ResidentStore
from halfbyte.training import session as session_module
from halfbyte.training import trainer as trainer_module
from halfbyte.training.checkpoint import list_checkpoints
from halfbyte.training.config import Config
from halfbyte.training.methods import attach_trained, open_base
from halfbyte.training.metrics import read_records
from halfbyte.training.room import Room, set_aside
from halfbyte.training.run import resume, train
from halfbyte.training.step import compute_gradients, reusing_activations
from halfbyte.training.trainer import Ending
from training.test_resume import StopAt, results
from training.tiny_run import make_config

PAGE = 32768
SETTINGS = (
    "training.max_steps=5",
    "training.save_steps=2",
    "training.eval_steps=5",
    "training.tokens_per_step=200",
    "training.learning_rate=0.003",
)
FULL = (*SETTINGS, "training.method=full")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that a tiny model has dozens."""
    monkeypatch.setattr(session_module, "make_optimizer", partial(make_optimizer, page_bytes=PAGE))


def at(tmp_path: Path, name: str, *assignments: str) -> Config:
    return make_config(tmp_path, *assignments, **{"output.dir": str(tmp_path / name)})


def paged(bits: str = "", pages: int = 3) -> tuple[str, str]:
    return f"optimizer.name=paged_adamw{bits}", f"optimizer.fast_bytes={pages * PAGE}"


def final(directory: Path) -> tuple[object, ...]:
    """What must be equal, for the method `full` too."""
    model = directory / "model"
    if not model.exists():
        return results(directory)
    files = [path.read_bytes() for path in sorted(model.glob("*.safetensors"))]
    (directory / "adapter").mkdir()
    (directory / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    return files, results(directory)


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        pytest.param((*FULL, "training.compute_dtype=bf16"), "", id="full-bf16"),
        pytest.param((*FULL, "training.compute_dtype=fp16"), "_8bit", id="full-fp16-8bit"),
        pytest.param((*SETTINGS, "lora.dropout=0.2"), "", id="qlora-fp32"),
    ],
)
def test_paging_changes_no_bit_across_a_stop(
    tmp_path: Path, settings: tuple[str, ...], bits: str
) -> None:
    whole = train(at(tmp_path, "whole", *settings, f"optimizer.name=adamw{bits}"))
    assert whole.outcome.paging is None
    stopped = train(at(tmp_path, "parts", *settings, *paged(bits)), StopAt(3))
    assert stopped.outcome.ending is Ending.STOPPED
    resumed = resume(tmp_path / "parts")
    assert resumed.outcome.paging is not None
    assert resumed.outcome.paging.paged_in_bytes > 0
    assert resumed.outcome.paging.peak_resident_bytes <= 3 * PAGE
    assert final(tmp_path / "parts") == final(tmp_path / "whole")


def test_every_step_records_what_was_paged(tmp_path: Path) -> None:
    train(at(tmp_path, "run", *FULL, *paged()))
    records = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert len(records) == 5
    for record in records:
        figures = record["paging"]
        assert isinstance(figures, dict)
        assert 0 < figures["resident_bytes"] <= figures["fast_bytes"] == 3 * PAGE
        assert figures["paged_out_bytes"] > 0
        assert figures["hits"] + figures["prefetched"] + figures["misses"] > 0
        assert figures["stall_seconds"] >= 0


def test_micro_batches_of_256_to_8192_tokens_in_one_run(tmp_path: Path) -> None:
    """Paged is unpaged while the budget follows what each micro-batch leaves.

    Beyond it the pool borrows what backwards have given up, and repays that in every step.
    """
    found = []
    for name, settings in (("adamw", {}), ("paged_adamw", {"fast_bytes": 10 * PAGE})):
        config = at(tmp_path, "run", *FULL)
        model = attach_trained(open_base(config), config)
        parameters = list(model.parameters.values())
        optimizer = make_optimizer(name, parameters, page_bytes=PAGE, lr=1e-3, **settings)
        accumulator = optimizer.accumulator(model.stand_ins)
        generator = torch.Generator().manual_seed(0)
        losses = []
        with (
            reusing_activations(parameters, least=PAGE),
            PeakSampler(aside=partial(set_aside, optimizer)) as sampler,
        ):
            room = Room(optimizer, sampler)
            for sizes in ([256, 1024], [8192], [256], [2048, 512, 4096]):
                batches = [random_batch(size, generator) for size in sizes]
                gradients = compute_gradients(
                    model.decoder,
                    batches,
                    accumulator,
                    max_norm=1.0,
                    around=lambda batch, room=room: room.around(batch.num_tokens),  # type: ignore[misc]
                )
                optimizer.step()
                assert optimizer.stats().resident_bytes <= optimizer.stats().fast_bytes
                losses.append((gradients.loss, gradients.norm, gradients.num_tokens))
        state = [tensor.clone() for tensor in optimizer.state_tensors().values()]
        found.append((losses, parameters, state))
    if backends.native_in_use():
        assert optimizer.stats().peak_resident_bytes > 10 * PAGE
    (losses, parameters, state), (others, twins, paged_state) = found
    assert losses == others
    assert [tokens for _, _, tokens in losses] == [1280, 8192, 256, 6656]
    for one, other in zip([*parameters, *state], [*twins, *paged_state], strict=True):
        assert torch.equal(one, other)


def random_batch(num_tokens: int, generator: torch.Generator) -> Batch:
    """Documents of 128 tokens, with a target at every eighth."""
    tokens = torch.randint(0, 400, (num_tokens,), generator=generator)
    targets = torch.full_like(tokens, -100)
    targets[::8] = tokens[1::8]
    rows = tuple(f"row {number}" for number in range(num_tokens // 128))
    return Batch(tokens, targets, pack([128] * len(rows)), rows)


class Failing:
    """A call of the system that begins to fail."""

    def __init__(self, call: Callable[..., int], number: int, code: int) -> None:
        self._call = call
        self.number = number
        self._code = code

    def __call__(self, *arguments: object) -> int:
        self.number -= 1
        if self.number < 0:
            raise OSError(self._code, os.strerror(self._code))
        return self._call(*arguments)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """What a run leaves whose disk is sound, and that needs none."""
    directory = tmp_path_factory.mktemp("undisturbed")
    train(at(directory, "run", *FULL))
    return final(directory / "run")


@pytest.mark.parametrize(
    ("call", "number", "code", "saves"),
    [
        # Calls are counted from the start of the run.
        pytest.param("posix_fallocate", 0, errno.ENOSPC, False, id="full-before-the-first-step"),
        pytest.param("posix_fallocate", 1, errno.EDQUOT, True, id="quota-in-the-first-step"),
        pytest.param("pwritev", 10, errno.ENOSPC, True, id="no-space-in-the-first-step"),
        pytest.param("pwritev", 100, errno.EIO, True, id="write-fails-later"),
        pytest.param("preadv", 100, errno.EIO, False, id="read-fails"),
    ],
)
def test_a_slow_tier_that_fails_costs_no_complete_step(
    tmp_path: Path,
    undisturbed: tuple[object, ...],
    call: str,
    number: int,
    code: int,
    saves: bool,
) -> None:
    failing = Failing(getattr(os, call), number, code)
    config = at(tmp_path, "run", *FULL, *paged())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(StorageError, match=os.strerror(code)) as caught:
            train(config)
    run = tmp_path / "run"
    steps = [r["step"] for r in read_records(run / "metrics.jsonl") if "loss" in r]
    checkpoints = [int(path.name.removeprefix("step-")) for path in list_checkpoints(run)]
    if saves:
        assert checkpoints[-1] == len(steps) < 5
    if checkpoints:
        assert f"halfbyte resume {run}" in str(caught.value)
    assert resume(run).outcome.ending is Ending.COMPLETE
    assert final(run) == undisturbed


def test_room_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    taken = {256: 100, 1024: 400, 512: 300}

    class Sampler:
        peak_besides = 0

        def reset_besides(self) -> int:
            return 50

    sampler = Sampler()
    params = [torch.nn.Parameter(torch.zeros(4))]
    optimizer = make_optimizer("paged_adamw", params, fast_bytes=2 * PAGE, page_bytes=PAGE)
    monkeypatch.setattr(StatefulOptimizer, "make_room", lambda _, n: asked.append(n))
    room = Room(optimizer, sampler)  # type: ignore[arg-type]
    for tokens in (256, 256, 1024, 512, 300, 2048, 100):
        with room.around(tokens):
            sampler.peak_besides = 50 + taken.get(tokens, 0)
    everything, again, larger, smaller, between, largest, least = asked
    assert everything > 2**50
    assert (again, larger) == (110, 440)  # a tenth more, and in proportion
    assert smaller == 440  # as the 1024 tokens took
    assert between == 330  # as the 512
    assert largest == 880
    assert least == 110


def test_what_paging_needs_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="paged_adamw needs optimizer"):
        at(tmp_path, "run", "optimizer.name=paged_adamw")
    with pytest.raises(ConfigError, match="adamw keeps all in memory"):
        at(tmp_path, "run", "optimizer.fast_bytes=1GB")
    config = at(tmp_path, "run", *paged(), f"optimizer.directory={tmp_path / 'absent'}")
    with pytest.raises(UsageError, match="no directory"):
        train(config)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.skipif(not backends.native_in_use(), reason="native kernels are absent")
def test_nothing_is_kept_where_the_optimizer_makes_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step may be the longest: what it took must not stay beside the state."""
    beside_state: list[int] = []
    between: list[int] = []
    add, step = ResidentStore.add, AdamW.step

    def watched_add(self: ResidentStore, items: Sequence[Item]) -> range:
        beside_state.append(activations.usage().kept)
        return add(self, items)

    def watched_step(self: AdamW) -> None:
        between.append(activations.usage().kept)
        step(self)

    monkeypatch.setattr(ResidentStore, "add", watched_add)
    monkeypatch.setattr(AdamW, "step", watched_step)
    monkeypatch.setattr(
        trainer_module,
        "reusing_activations",
        lambda p, least: reusing_activations(p, least=min(least, 4096)),
    )
    train(at(tmp_path, "run", *SETTINGS))
    assert beside_state == [0]
    assert len(between) > 1
    assert all(kept > 0 for kept in between)

"""State out and in: names, exactness, files, and what does not fit."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import FormatError, StorageError, UnsupportedError, UsageError
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_writer import SafetensorsWriter
from halfbyte.optim import (
    NAMES,
    AdamW,
    AdamW8bit,
    PagedAdamW,
    footprint,
    make_optimizer,
    weight_decay_groups,
)
from optim.problems import PAGE, assert_same, gradients, parameters, run


def named() -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"layers.{n}.weight", param) for n, param in enumerate(parameters())]


def test_names_are_those_of_the_parameters() -> None:
    pairs = named()
    optimizer = AdamW(pairs)
    assert dict(optimizer.state_tensors()) == {}
    run(optimizer, [p for _, p in pairs], range(2))
    state = optimizer.state_tensors()
    assert len(state) == 3 * len(pairs)
    assert list(state)[:3] == [
        "layers.0.weight.exp_avg",
        "layers.0.weight.exp_avg_sq",
        "layers.0.weight.step",
    ]
    assert state["layers.1.weight.exp_avg"].shape == pairs[1][1].shape
    assert state["layers.1.weight.step"] == 2
    for name, spec in state.specs().items():
        assert (spec.dtype, spec.shape) == (state[name].dtype, tuple(state[name].shape))
    for missing in ("layers.0.weight.other", "layers.99.weight.step", "nothing"):
        with pytest.raises(KeyError):
            state[missing]


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_8bit"])
def test_a_checkpoint_file_brings_back_every_bit(name: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"fast_bytes": 2 * PAGE, "page_bytes": PAGE} if "paged" in name else {}
    pairs = named()
    params = [p for _, p in pairs]
    optimizer = make_optimizer(name, pairs, lr=1e-2, **more)
    run(optimizer, params, range(2))
    saved = [p.detach().clone() for p in params]
    state = optimizer.state_tensors()
    path = tmp_path / "optimizer.safetensors"
    with SafetensorsWriter.open(path, state.specs()) as writer:
        for key, tensor in state.items():
            writer.write(key, tensor)
    run(optimizer, params, range(2, 5))

    again = named()
    for (_, param), value in zip(again, saved, strict=True):
        param.data.copy_(value)
    resumed = make_optimizer(name, again, lr=1e-2, **more)
    file = SafetensorsFile.open(path)
    resumed.load_state_tensors({key: file.read(key) for key in file.entries})
    run(resumed, [p for _, p in again], range(2, 5))
    assert_same([p for _, p in again], params)


def test_loading_replaces_all_state() -> None:
    """Parameters that the loaded state does not mention start anew, as they did then."""
    params = parameters()
    optimizer = AdamW(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    early = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    values = [p.detach().clone() for p in params]
    run(optimizer, params, range(3))
    after = [p.detach().clone() for p in params]

    for param, value in zip(params, values, strict=True):
        param.data.copy_(value)
    optimizer.load_state_tensors(early)
    assert len(optimizer.state_tensors()) == 3
    run(optimizer, params, range(3))
    assert_same(params, after)


def test_what_does_not_fit_is_listed_and_nothing_changes() -> None:
    params = parameters()
    optimizer = AdamW(params)
    run(optimizer, params, range(2))
    state = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    bad = dict(state)
    bad["0.exp_avg"] = torch.zeros(7)
    bad["1.exp_avg_sq"] = bad["1.exp_avg_sq"].half()
    del bad["2.exp_avg"]
    del bad["3.step"]
    bad["4.step"] = torch.tensor(-1.0)
    bad["5.momentum_buffer"] = torch.zeros(1, 1)
    bad["99.step"] = torch.tensor(1.0)
    bad["0.exp_avg_sq"].add_(1)
    with pytest.raises(FormatError, match="7 problems") as caught:
        optimizer.load_state_tensors(bad)
    for part in (
        "0.exp_avg: float32 [1000] expected, found float32 [7]",
        "2.exp_avg: missing",
        "'99'",
    ):
        assert part in str(caught.value)
    after = optimizer.state_tensors()
    assert all(torch.equal(after[k], state[k]) for k in state if k != "0.exp_avg_sq")


def test_8_bit_state_does_not_load_as_32_bit() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(1))
    with pytest.raises(FormatError, match=r"1\.exp_avg: missing"):
        AdamW(params).load_state_tensors(optimizer.state_tensors())
    with pytest.raises(FormatError, match=r"1\.exp_avg: missing"):
        AdamW(params).load_state_dict(optimizer.state_dict())


def test_state_dicts_that_ask_for_more_are_refused() -> None:
    params = parameters()
    oracle = torch.optim.AdamW(params, amsgrad=True)
    run(oracle, params, range(1))
    with pytest.raises(FormatError, match="max_exp_avg_sq: not expected") as caught:
        AdamW(params).load_state_dict(oracle.state_dict())
    assert "amsgrad: not supported" in str(caught.value)
    state = AdamW(params).state_dict()
    state["state"][99] = {"step": torch.tensor(1.0)}
    with pytest.raises(FormatError, match="99: no group"):
        AdamW(params).load_state_dict(state)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        AdamW(params).load_state_dict({"state": {}, "param_groups": []})


class BrokenOffError(Exception):
    pass


@pytest.mark.parametrize("paged", [False, True])
def test_a_step_broken_off_is_not_saved(paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    more = {"fast_bytes": 2 * PAGE, "page_bytes": PAGE} if paged else {}
    optimizer = make_optimizer("paged_adamw" if paged else "adamw", params, lr=1e-2, **more)
    run(optimizer, params, range(1))
    good = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    calls = []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise BrokenOffError

    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "_apply", interrupted)
        with pytest.raises(BrokenOffError):
            optimizer.step()
    for action in (optimizer.step, optimizer.state_tensors, optimizer.state_dict):
        with pytest.raises(StorageError, match="broken off"):
            action()
    optimizer.load_state_tensors(good)
    optimizer.step()


def test_a_broken_disk_ends_with_whole_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step during which writing fails is applied whole, the next not at all."""
    expected, params = parameters(), parameters()
    oracle = AdamW(expected)
    optimizer = PagedAdamW(params, fast_bytes=3 * PAGE, page_bytes=PAGE)
    for each, owned in ((oracle, expected), (optimizer, params)):
        run(each, owned, range(2))

    def fails(*_args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(optimizer._store._tier, "write", fails)
    for each, owned in ((oracle, expected), (optimizer, params)):
        run(each, owned, range(2, 3))
    with pytest.raises(StorageError, match="can still be exported"):
        run(optimizer, params, range(3, 4))
    assert_same(params, expected)
    state, whole = optimizer.state_tensors(), oracle.state_tensors()
    assert all(torch.equal(state[name], whole[name]) for name in whole)

    resumed = PagedAdamW(params, fast_bytes=3 * PAGE, page_bytes=PAGE)
    resumed.load_state_tensors(state)
    run(resumed, params, range(3, 5))
    run(oracle, expected, range(3, 5))
    assert_same(params, expected)


def test_a_full_disk_refuses_the_step_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = PagedAdamW(params, fast_bytes=3 * PAGE, page_bytes=PAGE)

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(StorageError, match="No space left"):
            run(optimizer, params, range(1))
    assert_same(params, before)
    assert len(optimizer.state_tensors()) == 0
    run(optimizer, params, range(1))


def test_a_page_that_is_lost_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = PagedAdamW(params, fast_bytes=2 * PAGE, page_bytes=PAGE)
    run(optimizer, params, range(1))

    def fails(*_args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(optimizer._store._tier, "read", fails)
    with pytest.raises(StorageError, match="could not be read back"):
        run(optimizer, params, range(1, 2))
    for action in (optimizer.step, optimizer.state_dict):
        with pytest.raises(StorageError, match="last checkpoint"):
            action()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr: at least 0"),
        ({"lr": float("nan")}, "lr"),
        ({"betas": (1.0, 0.9)}, "betas: at least 0 and below 1 expected, found 1.0"),
        ({"eps": -1e-8, "weight_decay": -1.0}, "2 problems"),
        ({"state_bits": 16}, "state_bits: 8 or 32 expected, found 16"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AdamW(parameters(), **settings)


def test_settings_of_torch_that_would_be_ignored_are_refused() -> None:
    optimizer = AdamW(parameters())
    with pytest.raises(UsageError, match="maximize: not supported"):
        optimizer.add_param_group({"params": parameters(), "maximize": True})
    assert len(optimizer.param_groups) == 1


def test_parameters_that_cannot_be_optimized() -> None:
    bad = [
        torch.nn.Parameter(torch.randn(3, 4).T),
        torch.nn.Parameter(torch.randn(3, dtype=torch.float64)),
    ]
    with pytest.raises(UnsupportedError, match="2 problems"):
        AdamW(bad)
    with pytest.raises(UnsupportedError, match="cpu expected"):
        AdamW([*parameters(), torch.nn.Parameter(torch.empty(3, device="meta"))])


def test_sparse_gradients_are_refused_and_transposed_ones_are_not() -> None:
    (param,) = [torch.nn.Parameter(torch.randn(5, 4))]
    optimizer = AdamW([param])
    param.grad = torch.zeros(5, 4).to_sparse()
    with pytest.raises(UnsupportedError, match="sparse"):
        optimizer.step()
    twin = torch.nn.Parameter(param.detach().clone())
    grad = torch.randn(4, 5)
    param.grad, twin.grad = grad.T, grad.T.contiguous()
    optimizer.step()
    AdamW([twin]).step()
    assert torch.equal(param, twin)


def test_a_step_without_gradients_does_nothing() -> None:
    params = parameters()
    optimizer = AdamW(params)
    optimizer.step()
    assert optimizer.state_bytes == 0
    gradients(params, 0)
    optimizer.step()
    assert optimizer.stats().resident_bytes == optimizer.state_bytes > 0


def test_unknown_names_and_settings() -> None:
    assert {"adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"} <= set(NAMES)
    for name, more, message in (
        ("adam_w", {}, "Did you mean 'adamw'"),
        ("paged_adamw", {}, "fast_bytes: expected with"),
        ("adamw", {"fast_bytes": 2**30}, "fast_bytes: not expected"),
        ("sgd", {"betas": (0.9, 0.99)}, "betas: one of lr, momentum, weight_decay expected"),
    ):
        with pytest.raises(UsageError, match=message):
            make_optimizer(name, parameters(), **more)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    groups = weight_decay_groups(model.named_parameters(), 0.1)
    found = [([n for n, _ in g["params"]], g["weight_decay"]) for g in groups]
    assert found == [(["0.weight"], 0.1), (["1.weight", "1.bias"], 0.0)]
    optimizer = AdamW(groups)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight"]
    assert (
        weight_decay_groups([("a", torch.nn.Parameter(torch.zeros(2)))], 0.1)[0]["weight_decay"]
        == 0
    )


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "lion", "sgd_8bit"])
def test_the_footprint_is_known_beforehand(name: str) -> None:
    params = parameters()
    budget = 2**20 if name.startswith("paged") else None
    optimizer = make_optimizer(name, params, lr=1e-3, fast_bytes=budget, page_bytes=PAGE)
    run(optimizer, params, range(1))
    found = footprint(name, [param.numel() for param in params], fast_bytes=budget)
    assert found.state == optimizer.state_bytes
    assert found.gradients == sum(param.nbytes for param in params)
    if budget is None:
        assert found.resident == found.state + found.gradients
    assert footprint(name, [10**9], fast_bytes=10**6).resident == 10**6
    with pytest.raises(UsageError, match="unknown optimizer"):
        footprint("adam", [1])

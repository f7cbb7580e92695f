"""Gradients through the decoder against transformers; recomputation; announcements to the store."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.errors import UsageError
from halfbyte.layers import linear as linear_module
from halfbyte.layers.cross_entropy import linear_cross_entropy
from halfbyte.layers.lora import LoraFactors
from halfbyte.layers.segments import pack
from halfbyte.layers.weights import ResidentStore, Weight, WeightRef
from halfbyte.models.config import parse_config
from halfbyte.models.decoder import Decoder
from halfbyte.models.trainable_store import TrainableStore
from tiny_models import CASES, SIZES, make_decoder, make_oracle, random_tokens, weights_of

COUNT = 21


def training_loss(decoder: Decoder, tokens: Tensor, **options: Any) -> Tensor:
    rows = torch.arange(len(tokens) - 1)
    features = decoder(tokens, pack([len(tokens)]), rows=rows, **options)
    return linear_cross_entropy(features, tokens[1:], decoder.head, chunk_rows=8)


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_equals_that_of_transformers(case: str) -> None:
    oracle = make_oracle(case)
    tokens = random_tokens(COUNT)
    logits = oracle(tokens[None]).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").backward()
    store = TrainableStore(weights_of(oracle), torch.float32)
    decoder = Decoder(parse_config(oracle.config.to_dict()), store, compute_dtype=torch.float32)
    training_loss(decoder, tokens).backward()
    expected = dict(oracle.named_parameters())
    for name, master in store.masters.items():
        wanted = expected[name].grad
        assert master.grad is not None
        assert wanted is not None
        # float32 on both sides; sums over 21 tokens, 4 layers and 131 logits in another order.
        assert (master.grad - wanted).abs().max() <= 1e-4 * max(1e-3, wanted.abs().max().item()), (
            name
        )


def test_bfloat16_working_copies_leave_their_gradients_with_float32_masters() -> None:
    oracle = make_oracle("llama-biases-tied")
    tokens = random_tokens(COUNT)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        store = TrainableStore(weights_of(oracle), dtype)
        decoder = Decoder(parse_config(oracle.config.to_dict()), store, compute_dtype=dtype)
        for _ in range(2):  # gradients of two passes add up
            training_loss(decoder, tokens).backward()
        gradients.append({name: master.grad for name, master in store.masters.items()})
    for name, exact in gradients[0].items():
        rounded = gradients[1][name]
        assert exact is not None
        assert rounded is not None
        assert rounded.dtype == torch.float32
        # Roundings of 2^-8 in 4 layers, both ways.
        assert (rounded - exact).norm() <= 0.1 * exact.norm(), name


def test_refreshed_working_copies_follow_their_masters() -> None:
    oracle = make_oracle("qwen3")
    store = TrainableStore(weights_of(oracle), torch.bfloat16)
    decoder = Decoder(parse_config(oracle.config.to_dict()), store)
    tokens = random_tokens(9)
    before = decoder.logits(tokens, pack([9]))
    with torch.no_grad():
        for master in store.masters.values():
            master.mul_(1.5)
    store.refresh()
    fresh = Decoder(
        decoder.config,
        ResidentStore(
            {
                n: m.detach().to(torch.bfloat16) if m.dim() > 1 else m.detach()
                for n, m in store.masters.items()
            }
        ),
    )
    after = decoder.logits(tokens, pack([9]))
    assert torch.equal(after, fresh.logits(tokens, pack([9])))
    assert not torch.equal(before, after)


def adapted_decoder(case: str, layers: tuple[int, ...] = (0, 1, 2, 3)) -> Decoder:
    oracle = make_oracle(case)
    weights: dict[str, Weight] = {
        name: hb.quantize(w) if "_proj.weight" in name else w
        for name, w in weights_of(oracle).items()
    }
    decoder = Decoder(
        parse_config(oracle.config.to_dict()), ResidentStore(weights), compute_dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(1)
    for path, linear in decoder.linears.items():
        if any(f".{layer}." in path for layer in layers):
            a = torch.randn(4, linear.in_features, generator=generator) * 0.1
            b = torch.randn(linear.out_features, 4, generator=generator) * 0.1
            linear.attach(
                "task", LoraFactors(a.requires_grad_(), b.requires_grad_(), 2.0, dropout=0.1)
            )
    decoder.mixes = ((("task", 1.0),),)
    return decoder


def factor_gradients(decoder: Decoder) -> list[Tensor]:
    found = []
    for linear in decoder.linears.values():
        for factors in linear.bank.values():
            for factor in (factors.a_RI, factors.b_OR):
                assert factor.grad is not None
                found.append(factor.grad)
                factor.grad = None
    return found


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_recomputed_layers_give_the_same_bits_with_dropout(case: str) -> None:
    decoder = adapted_decoder(case)
    tokens = random_tokens(COUNT)
    results = []
    for recompute in (0, 2, 4):
        loss = training_loss(decoder, tokens, dropout_seed=11, recompute=recompute)
        loss.backward()
        results.append((loss.detach(), factor_gradients(decoder)))
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        for found, expected in zip(gradients, results[0][1], strict=True):
            assert torch.equal(found, expected)
    other = training_loss(decoder, tokens, dropout_seed=12)
    assert not torch.equal(other.detach(), results[0][0])


@pytest.mark.parametrize(("case", "left_out"), [("llama", ["down_proj"]), ("gemma3", [])])
@pytest.mark.parametrize("method", ["adapters", "all-weights"])
def test_what_no_backward_reads_is_not_computed_again(
    monkeypatch: pytest.MonkeyPatch, case: str, left_out: list[str], method: str
) -> None:
    if method == "adapters":
        decoder = adapted_decoder(case)
    else:
        oracle = make_oracle(case)
        store = TrainableStore(weights_of(oracle), torch.float32)
        config = parse_config(oracle.config.to_dict())
        decoder = Decoder(config, store, compute_dtype=torch.float32)
    outputs: list[Tensor] = []
    placeholder = linear_module._unread_outputs

    def note(x: Tensor, linear: linear_module.Linear) -> Tensor:
        outputs.append(placeholder(x, linear))
        assert linear.path.endswith(left_out[0])
        return outputs[-1]

    monkeypatch.setattr(linear_module, "_unread_outputs", note)
    loss = training_loss(decoder, random_tokens(COUNT), recompute=4)
    assert not outputs  # the first run computes everything
    loss.backward()
    assert len(outputs) == 4 * len(left_out)
    assert all(out.isnan().all() for out in outputs)


def test_recomputed_layers_keep_one_tensor_each() -> None:
    decoder = adapted_decoder("llama")
    tokens = random_tokens(COUNT)
    sizes = []
    for recompute in (0, 4):
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            training_loss(decoder, tokens, recompute=recompute)
        sizes.append(total)
    assert sizes[1] < sizes[0] / 8


def living() -> dict[int, Tensor]:
    """Matrices with a row a token, or a target, by where they are."""
    gc.collect()
    return {
        found.untyped_storage().data_ptr(): found
        for found in gc.get_objects()
        if type(found) is Tensor and found.dim() == 2 and len(found) in (COUNT, COUNT - 1)
    }


def test_nothing_else_of_a_recomputed_layer_stays() -> None:
    decoder = adapted_decoder("llama")
    before = living()
    loss = training_loss(decoder, random_tokens(COUNT), recompute=4)
    kept = [tuple(found.shape) for place, found in living().items() if place not in before]
    # The input of each layer, and features at the targets before and after the last norm.
    hidden = decoder.config.hidden_size
    assert len(kept) <= 7
    assert set(kept) <= {(COUNT, hidden), (COUNT - 1, hidden)}
    loss.backward()


def test_a_layer_keeps_neither_what_it_normalizes_nor_what_it_gates() -> None:
    decoder = adapted_decoder("llama")
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if len(tensor) == COUNT:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = training_loss(decoder, random_tokens(COUNT))
    config, item = decoder.config, decoder.compute_dtype.itemsize
    heads = config.num_heads + config.num_key_value_heads
    # Two residual streams; queries, outputs of attention, keys, values; gate, up; and what seven
    # adapters of rank 4 make of their inputs.
    layer = 2 * config.hidden_size + 2 * heads * config.head_dim + 2 * config.intermediate_size
    assert sum(kept.values()) == len(decoder.layers) * COUNT * (layer + 7 * 4) * item
    assert loss.requires_grad


def test_nothing_is_computed_below_the_lowest_adapted_layer() -> None:
    decoder = adapted_decoder("llama", layers=(2, 3))
    seen: list[bool] = []
    for layer in decoder.layers:
        attend = layer._attend

        def watch(x: Tensor, *rest: Any, attend: Any = attend) -> Any:
            seen.append(x.requires_grad)
            return attend(x, *rest)

        layer._attend = watch  # type: ignore[method-assign]
    training_loss(decoder, random_tokens(COUNT)).backward()
    assert seen == [False, False, False, True]
    factor_gradients(decoder)


class NotedStore(ResidentStore):
    """Counts what is acquired and released, and notes announcements."""

    permanent = False

    def __init__(self, weights: dict[str, Weight]) -> None:
        super().__init__(weights)
        self.held: dict[str, int] = {}
        self.announced: list[int] = []

    def acquire(self, ref: WeightRef) -> Weight:
        self.held[ref.name] = self.held.get(ref.name, 0) + 1
        return super().acquire(ref)

    def release(self, ref: WeightRef) -> None:
        self.held[ref.name] -= 1

    def announce(self, layer: int) -> None:
        self.announced.append(layer)


def test_weights_are_released_and_layers_announced_both_ways() -> None:
    decoder = adapted_decoder("llama")
    stored = decoder.store
    assert isinstance(stored, ResidentStore)
    store = NotedStore(dict(stored._weights))
    noted = Decoder(decoder.config, store, compute_dtype=torch.float32)
    for path, linear in decoder.linears.items():
        noted.linears[path].attach("task", linear.bank["task"])
    noted.mixes = decoder.mixes
    loss = training_loss(noted, random_tokens(COUNT))
    assert store.announced == [1, 2, 3, 4]
    loss.backward()
    assert store.announced == [1, 2, 3, 4, 2, 1, 0, -1]
    assert set(store.held.values()) == {0}


def test_misuse_is_refused() -> None:
    decoder = make_decoder(make_oracle("llama"))
    tokens = random_tokens(4)
    with pytest.raises(UsageError, match=r"(?s)2 problems.*0 to 130.*found 9 to 500.*recompute"):
        decoder(torch.tensor([9, 500]), pack([2]), recompute=SIZES["num_hidden_layers"] + 1)
    with pytest.raises(UsageError, match="there is no cache"):
        decoder(tokens, pack([4], [2]))
    with pytest.raises(UsageError, match=r"int64 \[3\] expected"):
        decoder(tokens, pack([3]))

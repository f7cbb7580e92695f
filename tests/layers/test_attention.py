"""Attention over packed segments against softmax written out, and the cache against no cache."""

import pytest
import torch
from torch import Tensor

from halfbyte.layers import attention
from halfbyte.layers.attention import AttentionSpec, cached_attention, packed_attention
from halfbyte.layers.rotary import RotarySpec, inverse_frequencies, rotary_table
from halfbyte.layers.segments import Segments, lengths, pack

SPECS = [
    pytest.param(AttentionSpec(0.3), id="plain"),
    pytest.param(AttentionSpec(0.3, window=1), id="window-1"),
    pytest.param(AttentionSpec(0.3, window=5), id="window-5"),
    pytest.param(AttentionSpec(0.3, softcap=0.8), id="softcap"),
    pytest.param(AttentionSpec(0.3, window=6, softcap=0.8), id="window-softcap"),
]
HEADS = [pytest.param(6, 2, id="grouped"), pytest.param(3, 3, id="plain-heads")]


def written_out(q: Tensor, k: Tensor, v: Tensor, segments: Segments, spec: AttentionSpec) -> Tensor:
    """`[T, H, D]` for `[T, H, D]` queries, keys and values of `[S, G, D]`, all at once."""
    query_of = torch.repeat_interleave(
        torch.arange(segments.num_segments), torch.tensor(lengths(segments.bounds_q))
    )
    key_of = torch.repeat_interleave(
        torch.arange(segments.num_segments), torch.tensor(lengths(segments.bounds_k))
    )
    key_positions = torch.cat([torch.arange(n) for n in lengths(segments.bounds_k)])
    distance = segments.positions[:, None] - key_positions
    visible = (query_of[:, None] == key_of) & (distance >= 0)
    if spec.window is not None:
        visible &= distance < spec.window
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def normals(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["kernel", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernel where there is one; PyTorch's attention, in blocks small enough to cut."""
    if request.param == "torch":
        monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
        monkeypatch.setattr(attention, "_has_kernel", lambda _: False)
    elif not attention._has_kernel(torch.zeros(1)):
        pytest.skip("native kernels are absent")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("counts", [[13], [1, 9, 2, 17]], ids=str)
@pytest.mark.usefixtures("path")
def test_packed(spec: AttentionSpec, heads: int, groups: int, counts: list[int]) -> None:
    segments = pack(counts)
    shapes = [(sum(counts), h, 8) for h in (heads, groups, groups)]
    inputs = [normals(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    twins = [x.detach().double().requires_grad_() for x in inputs]
    found = packed_attention(*inputs, segments, spec)
    expected = written_out(*twins, segments, spec)
    # float32 products of length 8 and sums over at most 17 keys: a few dozen roundings of 2^-24.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2**-19)
    upstream = normals(*found.shape, seed=9)
    found.backward(upstream)
    expected.backward(upstream.double())
    for x, twin in zip(inputs, twins, strict=True):
        assert x.grad is not None
        assert twin.grad is not None
        torch.testing.assert_close(x.grad.double(), twin.grad, rtol=0, atol=2**-17)


@pytest.mark.usefixtures("path")
def test_queries_and_keys_are_turned_first() -> None:
    segments, spec = pack([9, 4]), AttentionSpec(0.3)
    frequencies = inverse_frequencies(RotarySpec(100.0), 8)
    angles = rotary_table(frequencies, segments.positions, 1.25)
    inputs = [normals(13, h, 8, seed=i).requires_grad_() for i, h in enumerate((6, 2, 2))]
    twins = [x.detach().double().requires_grad_() for x in inputs]

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(*(a.double() for a in angles))
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    expected = written_out(turned(twins[0]), turned(twins[1]), twins[2], segments, spec)
    # What the kernel turns in place must not be a leaf that is read again.
    found = packed_attention(*(x.clone() for x in inputs), segments, spec, angles)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2**-18)
    upstream = normals(*found.shape, seed=9)
    found.backward(upstream)
    expected.backward(upstream.double())
    for x, twin in zip(inputs, twins, strict=True):
        assert x.grad is not None
        assert twin.grad is not None
        torch.testing.assert_close(x.grad.double(), twin.grad, rtol=0, atol=2**-16)
    with torch.no_grad():
        again = packed_attention(*(x.clone() for x in inputs), segments, spec, angles)
    assert torch.equal(again, found)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize(("new", "past"), [([1], [11]), ([1, 6, 1, 3], [4, 9, 0, 0])], ids=str)
@pytest.mark.usefixtures("path")
def test_cached(
    spec: AttentionSpec, heads: int, groups: int, new: list[int], past: list[int]
) -> None:
    segments = pack(new, past)
    totals = lengths(segments.bounds_k)
    q = normals(sum(new), heads, 8, seed=0)
    k, v = (normals(sum(totals), groups, 8, seed=seed) for seed in (1, 2))
    keys, values = ([part.transpose(0, 1) for part in x.split(totals)] for x in (k, v))
    found = cached_attention(q, keys, values, segments, spec)
    torch.testing.assert_close(found, written_out(q, k, v, segments, spec), rtol=0, atol=2**-19)

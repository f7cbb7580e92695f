"""Attention of packed documents, and what stands between two products, against PyTorch's."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import GateError, Machine, Row, Subject, compare
from halfbyte.layers.activation import gated
from halfbyte.layers.attention import AttentionSpec, packed_attention
from halfbyte.layers.norm import rms_norm
from halfbyte.layers.rotary import RotarySpec, inverse_frequencies, rotary_table, rotate
from halfbyte.layers.segments import Segments, lengths, pack

HEADS, GROUPS, FEATURES = 9, 3, 64  # of SmolLM2-135M, as are these
HIDDEN, INTERMEDIATE = 576, 1536
TOKENS = 2048
SPEC = AttentionSpec(FEATURES**-0.5)


def normals(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor that wants gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


@functools.cache
def inputs(dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values."""
    heads = (HEADS, GROUPS, GROUPS)
    return [normals(TOKENS, h, FEATURES, seed=i, dtype=dtype) for i, h in enumerate(heads)]


def peer_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """PyTorch's attention, a document at a time."""
    parts = []
    for begin, end in pairwise(segments.bounds_q):
        heads = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        out = functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def operations(segments: Segments, products: int) -> float:
    """Multiplications and additions of this many products of visible queries and keys."""
    pairs = sum(n * (n + 1) / 2 for n in lengths(segments.bounds_q))
    return 2.0 * products * pairs * HEADS * FEATURES


def both_ways(function: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """An output and the gradients of its sum."""
    out = function()
    return [out, *torch.autograd.grad(out.sum(), leaves)]


def attention_gate() -> None:
    """Both stay close to PyTorch's attention in float32."""
    segments = pack([300, 1, 77])
    few = [x[:378].detach().requires_grad_() for x in inputs(torch.bfloat16)]
    wide = [x.detach().float().requires_grad_() for x in few]
    exact = both_ways(lambda: peer_attention(*wide, segments), wide)
    found = both_ways(lambda: packed_attention(*few, segments, SPEC), few)
    for name, a, b in zip(("output", "q", "k", "v"), found, exact, strict=True):
        # Roundings of the output and of the result, to bfloat16.
        worst = ((a.float() - b).abs().max() / b.abs().max()).item()
        if worst > 2 * 2**-8:
            raise GateError(f"{name}: off by {worst:.2e} of the largest")


def measure_attention(machine: Machine, turns: int) -> list[Row]:
    """Forward, and forward with backward."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = leaves = inputs(dtype)
        name = str(dtype).removeprefix("torch.")
        for counts in ([512] * 4, [2048]):
            segments = pack(counts)

            def ours(segments: Segments = segments, x: tuple[Tensor, ...] = (q, k, v)) -> Tensor:
                return packed_attention(*x, segments, SPEC)

            def theirs(segments: Segments = segments, x: tuple[Tensor, ...] = (q, k, v)) -> Tensor:
                return peer_attention(*x, segments)

            shape = f"{len(counts)} x {counts[0]} tokens, {HEADS} heads ({GROUPS}) of {FEATURES}"
            with torch.no_grad():
                floor = machine.multiplying(operations(segments, 2))
                case = f"forward, {shape}, {name}"
                rows.append(compare(case, ours, {"torch": theirs}, turns, (floor, "matmul")))
            floor = machine.multiplying(operations(segments, 2 + 5))
            case = f"forward and backward, {shape}, {name}"
            actions = [lambda f=f, x=leaves: both_ways(f, x) for f in (ours, theirs)]
            rows.append(compare(case, actions[0], {"torch": actions[1]}, turns, (floor, "matmul")))
    return rows


@dataclass(frozen=True, slots=True)
class Elementwise:
    """One operator: ours, PyTorch's, the tensors that want gradients, and bytes it must move."""

    name: str
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    leaves: list[Tensor]
    forward_bytes: int
    backward_bytes: int


def peer_rotation(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """As transformers writes it."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * torch.cat((cosine, cosine), dim=-1) + turned * torch.cat((sine, sine), dim=-1)


@functools.cache
def operators() -> list[Elementwise]:
    """With the shapes of SmolLM2-135M and 2,048 tokens."""
    x, weight = normals(TOKENS, HIDDEN, seed=0), torch.ones(HIDDEN)
    narrow_weight = weight.bfloat16()
    gate, up = (normals(TOKENS, INTERMEDIATE, seed=seed) for seed in (1, 2))
    q = normals(TOKENS, HEADS, FEATURES, seed=3)
    frequencies = inverse_frequencies(RotarySpec(10000.0), FEATURES)
    cosine, sine = rotary_table(frequencies, torch.arange(TOKENS), 1.0)
    narrow = (cosine.bfloat16(), sine.bfloat16())
    one, wide, heads = 2 * TOKENS * HIDDEN, 2 * TOKENS * INTERMEDIATE, 2 * q.numel()
    return [
        Elementwise(
            "RMSNorm",
            lambda: rms_norm(x, weight, 1e-5),
            lambda: functional.rms_norm(x, (HIDDEN,), narrow_weight, 1e-5),
            [x],
            2 * one,
            3 * one,
        ),
        Elementwise(
            "rotary",
            lambda: rotate(q, cosine, sine),
            lambda: peer_rotation(q, *narrow),
            [q],
            2 * heads,
            2 * heads,
        ),
        Elementwise(
            "SwiGLU",
            lambda: gated(gate, up, "silu"),
            lambda: functional.silu(gate) * up,
            [gate, up],
            3 * wide,
            5 * wide,
        ),
        Elementwise(
            "GeGLU",
            lambda: gated(gate, up, "gelu_pytorch_tanh"),
            lambda: functional.gelu(gate, approximate="tanh") * up,
            [gate, up],
            3 * wide,
            5 * wide,
        ),
    ]


def elementwise_gate() -> None:
    """Both ways round differently to bfloat16, a few times each."""
    for operator in operators():
        found = both_ways(operator.ours, operator.leaves)
        expected = both_ways(operator.theirs, operator.leaves)
        for a, b in zip(found, expected, strict=True):
            worst = ((a - b).float().abs().max() / b.float().abs().max()).item()
            if worst > 4 * 2**-8:
                raise GateError(f"{operator.name}: off by {worst:.2e} of the largest")


def measure_elementwise(machine: Machine, turns: int) -> list[Row]:
    """Forward, and forward with backward."""
    rows = []
    for operator in operators():
        with torch.no_grad():
            floor = (
                machine.reading(operator.forward_bytes),
                "memory",
            )
            rows.append(
                compare(
                    f"{operator.name}, forward",
                    operator.ours,
                    {"torch": operator.theirs},
                    3 * turns,
                    floor,
                )
            )
        both = machine.reading(operator.forward_bytes + operator.backward_bytes)
        actions = [
            lambda f=f, o=operator: both_ways(f, o.leaves) for f in (operator.ours, operator.theirs)
        ]
        case = f"{operator.name}, forward and backward"
        rows.append(compare(case, actions[0], {"torch": actions[1]}, 3 * turns, (both, "memory")))
    return rows


SUBJECTS = (
    Subject("attention", "Attention", attention_gate, measure_attention),
    Subject(
        "elementwise",
        "Between products, 2,048 tokens of SmolLM2-135M, bfloat16",
        elementwise_gate,
        measure_elementwise,
    ),
)

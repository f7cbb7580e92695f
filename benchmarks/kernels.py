"""Quantizing, dequantizing and multiplying against bitsandbytes and dense products.

Products are of bfloat16, or of float32 where PyTorch multiplies that faster: what somebody would
use on the machine. Few rows, as when tokens are generated, are of bfloat16 everywhere, and there
the peer is dense in both.
"""

import functools

import bitsandbytes
import torch
from bitsandbytes import functional as peer
from torch import Tensor
from torch.nn import functional

import halfbyte as hb
from benchmarks.harness import Action, GateError, Machine, Row, Subject, compare
from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.kernels import linear_input_gradient

SIDE = 4096
NUMEL = SIDE * SIDE
STORED = NUMEL / 2 + NUMEL / 64  # bytes of codes and 8-bit scales


@functools.cache
def dense() -> Tensor:
    """The weight that everything here is about."""
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).bfloat16()


@functools.cache
def ours(*, double_quant: bool = True) -> QuantizedTensor:
    """It in NF4."""
    return hb.quantize(dense(), double_quant=double_quant)


@functools.cache
def theirs() -> tuple[Tensor, peer.QuantState]:
    """It in bitsandbytes' NF4 with double quantization."""
    codes, state = peer.quantize_4bit(dense(), quant_type="nf4", compress_statistics=True)
    return codes, state


@functools.cache
def their_layer(dtype: torch.dtype) -> bitsandbytes.nn.Linear4bit:
    """A layer for inference; it repacks its weight at the first call if the processor can."""
    layer = bitsandbytes.nn.Linear4bit(
        SIDE, SIDE, bias=False, compute_dtype=dtype, quant_type="nf4"
    )
    layer.load_state_dict({"weight": dense()})
    return layer.to("cpu").eval()


def rows_of(count: int, dtype: torch.dtype) -> Tensor:
    """An input."""
    return torch.randn(count, SIDE, generator=torch.Generator().manual_seed(count)).to(dtype)


def require(condition: bool | Tensor, message: str) -> None:  # noqa: FBT001
    """Raise unless the gate is green."""
    if not condition:
        raise GateError(message)


def quantize_gate() -> None:
    """First-level codes and scales are bitsandbytes', and so is what they decode to."""
    q = hb.quantize(dense(), double_quant=False)
    codes, state = peer.quantize_4bit(dense(), quant_type="nf4", compress_statistics=False)
    require(torch.equal(q.codes, codes.reshape(-1)), "codes differ from bitsandbytes")
    require(torch.equal(q.scales, state.absmax), "scales differ from bitsandbytes")
    require(
        torch.equal(q.dequantize().reshape(-1), peer.dequantize_4bit(codes, state).reshape(-1)),
        "decoded weights differ from bitsandbytes",
    )


def linear_gate() -> None:
    """Products equal those of the decoded weight, up to rounding."""
    for dtype, roundoff in ((torch.bfloat16, 2**-8), (torch.float32, 2**-20)):
        weight = ours().dequantize(dtype=dtype).float()
        for count in (1, 5, 16, 128, 512):
            x = rows_of(count, dtype)
            for product, exact in (
                (hb.linear(x, ours()), x.float() @ weight.T),
                (linear_input_gradient(x, ours()), x.float() @ weight),
            ):
                # Unit roundoff of bfloat16, and as much again for sums in another order; those of
                # float32 differ by some roundoffs of a sum of 4096 terms.
                worst = (product.float() - exact).abs().max() / exact.abs().max()
                require(
                    worst <= 2 * roundoff,
                    f"{count} rows of {dtype}: off by {worst:.2e} of the largest output",
                )


def measure_quantize(machine: Machine, turns: int) -> list[Row]:
    """NF4 with double quantization."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = dense().to(dtype)
        rows.append(
            compare(
                f"NF4 + double quantization, {SIDE}^2, {str(dtype).removeprefix('torch.')}",
                lambda w=weight: hb.quantize(w),
                {
                    "bitsandbytes": lambda w=weight: peer.quantize_4bit(
                        w, quant_type="nf4", compress_statistics=True
                    )
                },
                max(3, turns // 3),
                (machine.reading(weight.nbytes), "memory read"),
                {"bitsandbytes": 25},
            )
        )
    return rows


def measure_dequantize(machine: Machine, turns: int) -> list[Row]:
    """Into a buffer that is reused, and into a fresh one."""
    out = torch.empty(SIDE, SIDE, dtype=torch.bfloat16)
    codes, state = theirs()
    fresh = {"bitsandbytes": lambda: peer.dequantize_4bit(codes, state)}
    floor = (machine.writing(out.nbytes), "memory write")
    return [
        compare(
            f"to bfloat16, {SIDE}^2, reused buffer",
            lambda: ours().dequantize(out=out),
            fresh,
            turns,
            floor,
            {"bitsandbytes": 4},
        ),
        compare(
            f"to bfloat16, {SIDE}^2, fresh tensor", lambda: ours().dequantize(), fresh, turns, floor
        ),
    ]


DENSE = "dense"
INFERENCE_TARGETS = {
    1: {"bitsandbytes": 1.3, DENSE: 4.0},
    16: {"bitsandbytes": 1.2},
    128: {"bitsandbytes": 1.05},
}
TRAINING_TARGETS = {512: {DENSE: 1 / 1.06}, 2048: {DENSE: 1 / 1.03}}
DOUBLE_QUANTIZATION_TARGETS = {1: 1 / 1.05, 512: 1 / 1.01}


def floor_of(machine: Machine, count: int) -> tuple[float, str]:
    """Reading the codes or multiplying, whichever takes longer."""
    reading, multiplying = machine.reading(STORED), machine.multiplying(2.0 * count * NUMEL)
    return max((reading, "memory read"), (multiplying, "matmul"))


CALLS = 60


def repeated(action: Action) -> Action:
    """Many calls in a row: the codes of a 4-bit weight stay in a cache, a dense weight does not."""

    def run() -> None:
        for _ in range(CALLS):
            action()

    return run


def measure_linear(machine: Machine, turns: int) -> list[Row]:
    """Inference, training forward and the input gradient."""
    dtype: torch.dtype = getattr(torch, machine.matmul_dtype)
    weight, (codes, state) = dense().to(dtype), theirs()
    rows = []
    with torch.inference_mode():
        for count in (1, 2, 4, 8, 16):
            x = rows_of(count, torch.bfloat16)
            peers = {
                "bitsandbytes": lambda x=x: their_layer(torch.bfloat16)(x),
                DENSE: lambda x=x: functional.linear(x, dense()),
            }
            if dtype != torch.bfloat16:
                wide = x.to(dtype)
                peers[f"{DENSE} {machine.matmul_dtype}"] = lambda x=wide: functional.linear(
                    x, weight
                )
            action = lambda x=x: hb.linear(x, ours())  # noqa: E731
            targets = INFERENCE_TARGETS.get(count)
            rows.append(
                compare(
                    f"inference, {count} rows, bfloat16",
                    action,
                    peers,
                    turns * 5,
                    floor_of(machine, count),
                    targets,
                )
            )
            if count == 1:
                multiplying = CALLS * machine.multiplying(2.0 * NUMEL)
                rows.append(
                    compare(
                        f"the same, {CALLS} calls in a row",
                        repeated(action),
                        {name: repeated(peer) for name, peer in peers.items()},
                        turns,
                        (multiplying, "matmul"),
                        targets,
                    )
                )
        for count in (32, 64, 128):
            x = rows_of(count, dtype)
            rows.append(
                compare(
                    f"inference, {count} rows, {machine.matmul_dtype}",
                    lambda x=x: hb.linear(x, ours()),
                    {
                        "bitsandbytes": lambda x=x: their_layer(dtype)(x),
                        DENSE: lambda x=x: functional.linear(x, weight),
                    },
                    turns,
                    floor_of(machine, count),
                    INFERENCE_TARGETS.get(count),
                )
            )
    for count in (512, 2048):
        x = rows_of(count, dtype)
        rows += [
            compare(
                f"training forward, {count} rows, {machine.matmul_dtype}",
                lambda x=x: hb.linear(x, ours()),
                {
                    "bitsandbytes": lambda x=x: bitsandbytes.matmul_4bit(
                        x, codes.t(), quant_state=state
                    ),
                    DENSE: lambda x=x: functional.linear(x, weight),
                },
                turns,
                floor_of(machine, count),
                TRAINING_TARGETS[count],
            ),
            compare(
                f"input gradient, {count} rows, {machine.matmul_dtype}",
                lambda x=x: linear_input_gradient(x, ours()),
                {DENSE: lambda x=x: x @ weight},
                turns,
                floor_of(machine, count),
                TRAINING_TARGETS[count],
            ),
        ]
    return rows


def measure_double_quantization(machine: Machine, turns: int) -> list[Row]:
    """What decoding double-quantized scales costs, in both orders of a turn."""
    rows = []
    for count, least in DOUBLE_QUANTIZATION_TARGETS.items():
        kind = torch.bfloat16 if count == 1 else getattr(torch, machine.matmul_dtype)
        x = rows_of(count, kind)
        rows += [
            compare(
                f"{count} rows, {str(kind).removeprefix('torch.')}, {'last' if last else 'first'}",
                lambda x=x: hb.linear(x, ours()),
                {"plain scales": lambda x=x: hb.linear(x, ours(double_quant=False))},
                turns * 5 if count == 1 else turns,
                floor_of(machine, count),
                {"plain scales": least},
                ours_last=last,
            )
            for last in (False, True)
        ]
    return rows


SUBJECTS = (
    Subject("quantize", "Quantizing", quantize_gate, measure_quantize),
    Subject("dequantize", "Dequantizing", quantize_gate, measure_dequantize),
    Subject("linear", "Multiplying by a 4-bit weight, 4096^2", linear_gate, measure_linear),
    Subject(
        "double_quantization",
        "Double-quantized scales against plain ones, 4096^2",
        linear_gate,
        measure_double_quantization,
    ),
)

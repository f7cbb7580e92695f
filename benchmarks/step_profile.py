"""Where the time of a training step goes, and how near its products come to the machine's limit.

    python -m benchmarks.step_profile MODEL [--shape 4x512] [--recompute] [--rank 16] \
        [--dtype bfloat16]

Every operator's own time is counted once, under the part of the step that it belongs to; what no
operator took is Python's. Decoding 4-bit weights happens inside the products, so its time is
measured beside the step, one decoding of all weights for each pass over them, and taken out of
theirs. Utilisation is the arithmetic of all products against PyTorch's fastest large matmul.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import halfbyte as hb
from benchmarks.harness import describe_machine
from benchmarks.training_batches import batches
from benchmarks.training_ours import pack_documents
from halfbyte.adapters.spec import LoraSpec
from halfbyte.adapters.training import attach_new_adapter
from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.kernels import activations
from halfbyte.memory.allocator import return_freed_memory
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import load_decoder
from halfbyte.training.step import compute_gradients, reusing_activations

PARTS = {
    "products": ("linear_4bit", "matmul_into_", "aten::mm", "aten::addmm", "aten::linear"),
    "attention": ("attention", "scaled_dot_product"),
    "loss": ("cross_entropy", "logsumexp", "LinearCrossEntropy"),
    "optimizer": ("adamw", "aten::sqrt"),
}
"""Part -> what its operators' names contain; every other operator is `element-wise and copies`."""
ELEMENTWISE = "element-wise and copies"


def part_of(operator: str) -> str:
    """The part of the step that an operator belongs to."""
    for part, names in PARTS.items():
        if any(name in operator for name in names):
            return part
    return ELEMENTWISE


def decoding_seconds(decoder: Decoder, passes: int) -> float:
    """The time to decode every 4-bit weight into a buffer that is there already, so many times."""
    weights = [linear.store.acquire(linear.weight) for linear in decoder.linears.values()]
    quantized = [w for w in weights if isinstance(w, QuantizedTensor)]
    buffers = {w.shape: torch.empty(w.shape, dtype=decoder.compute_dtype) for w in quantized}
    begin = time.perf_counter()
    for weight in quantized:
        weight.dequantize(out=buffers[weight.shape])
    return passes * (time.perf_counter() - begin)


def operations(decoder: Decoder, rank: int, num_tokens: int, num_targets: int, passes: int) -> int:
    """Multiplications and additions of a step's products with weights and factors."""
    shapes = [linear.weight.shape for linear in decoder.linears.values()]
    weights = sum(outputs * inputs for outputs, inputs in shapes)
    factors = sum(rank * (outputs + inputs) for outputs, inputs in shapes)
    vocabulary, features = decoder.head.weight.shape
    # Factors have gradients of their own; the head is multiplied with forward and backward.
    return 2 * (
        num_tokens * (passes * weights + (passes + 1) * factors)
        + 2 * num_targets * vocabulary * features
    )


def main() -> None:
    """Take three steps, look at the last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_profile", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--shape", default="4x512")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--recompute", action="store_true")
    arguments = parser.parse_args()
    arguments.data, arguments.steps = None, 3
    decoder = load_decoder(arguments.model, compute_dtype=getattr(torch, arguments.dtype))
    return_freed_memory()  # as a run does
    adapter = attach_new_adapter(decoder, LoraSpec(rank=arguments.rank), seed=0)
    optimizer = hb.optim.make_optimizer("adamw", list(adapter.parameters.items()), lr=1e-4)
    accumulator = optimizer.accumulator()
    recompute = len(decoder.layers) if arguments.recompute else 0
    passes = 3 if arguments.recompute else 2
    with reusing_activations(adapter.parameters.values()):
        for documents in batches(arguments):
            batch = pack_documents(documents)
            fresh = activations.usage().fresh
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                begin = time.perf_counter()
                compute_gradients(decoder, [batch], accumulator, recompute=recompute)
                optimizer.step()
                total = time.perf_counter() - begin
            fresh = activations.usage().fresh - fresh
    parts: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        parts[part_of(event.key)] += event.self_cpu_time_total / 1e6
    decoding = decoding_seconds(decoder, passes)
    parts["products"] -= decoding
    parts["decoding 4-bit weights"] = decoding
    parts["Python, and waiting"] = total - sum(parts.values())
    work = operations(decoder, arguments.rank, batch.num_tokens, batch.num_targets, passes)
    limit = describe_machine().matmul_rate
    print(f"{arguments.shape} tokens, {total:.2f} s, {batch.num_tokens / total:.0f} tokens/s\n")
    print("| part | seconds | of the step |\n|---|---|---|")
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"| {part} | {seconds:.3f} | {seconds / total:.1%} |")
    print(
        f"\nproducts: {work / parts['products'] / 1e9:.0f} GFLOP/s while they run; the whole step "
        f"{work / total / 1e9:.0f} GFLOP/s, {work / total / limit:.0%} of the {limit / 1e9:.0f} "
        "GFLOP/s of PyTorch's fastest large matmul here"
    )
    print(f"activations in memory fresh from the system: {fresh / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

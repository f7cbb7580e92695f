"""What the pool costs a LoRA step: processor time of accumulating, clipping and stepping.

    python benchmarks/lora_paging.py

Rank 16 on all linear layers of SmolLM2-135M. Thread time rather than seconds: other work on the
machine changes it less.
"""

import statistics
import time

import torch

from halfbyte import optim

RANK, LAYERS, TURNS = 16, 30, 12
LINEARS = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
CASES: list[tuple[str, int | None]] = [("adamw", None), ("paged_adamw", 128), ("paged_adamw", 8)]


def factors() -> list[torch.nn.Parameter]:
    """A and B of every linear layer."""
    shapes = [shape for o, i in LINEARS * LAYERS for shape in ((RANK, i), (o, RANK))]
    return [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    for name, budget in CASES:
        torch.manual_seed(0)
        params = factors()
        gradients = [torch.randn_like(param) * 1e-3 for param in params]
        fast_bytes = None if budget is None else budget * 2**20
        optimizer = optim.make_optimizer(name, params, lr=1e-4, fast_bytes=fast_bytes)
        accumulator = optimizer.accumulator()
        spent = []
        for _ in range(TURNS):
            begun = time.thread_time()
            accumulator.begin()
            for param, gradient in zip(params, gradients, strict=True):
                # The hook runs here as it does in a backward pass through a model.
                torch.autograd.backward(param, gradient)
            accumulator.finish(1.0)
            optimizer.step()
            spent.append(time.thread_time() - begun)
        stall = optimizer.stats().stall_seconds / TURNS
        label = name if budget is None else f"{name}, {budget} MiB"
        print(
            f"{label:22} {1e3 * statistics.median(spent):6.1f} ms of processor time a step, "
            f"{1e3 * stall:.0f} ms of waiting"
        )


if __name__ == "__main__":
    main()

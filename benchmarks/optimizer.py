"""Optimizer steps over the shapes of a 135M-parameter model: time and memory by budget.

    python benchmarks/optimizer.py [--rounds 3] [--threads 2]

Times: a resident and a paged optimizer take turns on the same gradients, step by step, while the
budget of the paged one changes; the figures are medians, the ratio that of each pair. Before
anything is printed, the parameters of both must be equal, bit for bit.

Memory: VmHWM at the end of a process that does two steps and nothing else. Parameters and
gradients in float32 take 1.08 GB of it, state as much again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte import optim
from halfbyte.memory.resident import peak_bytes

MB = 10**6
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
SHAPES = [(49152, 576), *([*LAYER, (576,), (576,)]) * 30, (576,)]
"""Of SmolLM2-135M."""
BUDGETS = [1200, 768, 512, 256, 128, 64, 32]
"""MB of float32 state, of which there are 1,076."""

Params = list[torch.nn.Parameter]


@dataclass
class Pair:
    """Seconds of a step, resident and paged, and what the paged one moved."""

    budget: int
    resident: float
    paged: float
    stall: float
    moved: int


def parameters(like: Params | None = None) -> Params:
    """The model's parameters, with gradients; those of `like` are shared."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for number, shape in enumerate(SHAPES):
        param = torch.nn.Parameter(torch.empty(shape).normal_(0, 0.02, generator=generator))
        if like is None:
            param.grad = torch.empty(shape).normal_(0, 1e-3, generator=generator)
        else:
            param.data.copy_(like[number].data)
            param.grad = like[number].grad
        params.append(param)
    return params


def timed(step: Callable[[], object]) -> float:
    """Seconds it takes."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def take_turns(rounds: int) -> tuple[list[Pair], float, str]:
    """Step both, budget by budget. Also the seconds of a PyTorch step, and the slow tier."""
    ours = parameters()
    theirs, torchs = parameters(ours), parameters(ours)
    resident = optim.AdamW(ours, lr=1e-4)
    paged = optim.PagedAdamW(theirs, lr=1e-4, fast_bytes=BUDGETS[0] * MB)
    peer = torch.optim.AdamW(torchs, lr=1e-4)
    pairs, peer_seconds = [], []
    for _ in range(rounds):
        for budget in BUDGETS:
            paged.set_fast_bytes(budget * MB)
            resident.step()
            paged.step()  # fills the budget, or empties it
            before = paged.stats()
            first, second = timed(resident.step), timed(paged.step)
            moved = paged.stats().since(before)
            pages = moved.paged_in_bytes + moved.paged_out_bytes
            pairs.append(Pair(budget, first, second, moved.stall_seconds, pages))
        peer_seconds.append(timed(peer.step))
    if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        sys.exit("paged and resident parameters differ: no times are shown")
    return pairs, statistics.median(peer_seconds[1:] or peer_seconds), paged.stats().slow_tier


def peak_of(name: str, settings: dict[str, Any]) -> int:
    """VmHWM of a process that does two steps, in bytes."""
    command = [sys.executable, __file__, "--memory", json.dumps([name, settings])]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    return int(done.stdout)


def two_steps(name: str, settings: dict[str, Any]) -> None:
    """Do two steps and print the peak."""
    optimizer = optim.make_optimizer(name, parameters(), lr=1e-4, **settings)
    optimizer.step()
    optimizer.step()
    print(peak_bytes())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Optimizer steps: time and memory by budget.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        two_steps(*json.loads(arguments.memory))
        return
    pairs, peer, slow_tier = take_turns(arguments.rounds)
    print(f"threads: {arguments.threads}, slow tier: {slow_tier}")
    print(f"torch.optim.AdamW: {peer:.3f} s a step")
    print("budget MB  resident s  paged s  paged / resident  stall s  moved MB")
    for budget in BUDGETS:
        mine = [pair for pair in pairs if pair.budget == budget]
        ratio = statistics.median(pair.paged / pair.resident for pair in mine)
        print(
            f"{budget:9} {statistics.median(p.resident for p in mine):11.3f} "
            f"{statistics.median(p.paged for p in mine):8.3f} {ratio:17.2f} "
            f"{statistics.median(p.stall for p in mine):8.3f} "
            f"{statistics.median(p.moved for p in mine) / MB:9.0f}"
        )
    everything = peak_of("adamw", {})
    print(f"peak of adamw: {everything / MB:.0f} MB")
    for name, budget in (("paged_adamw", 128), ("adamw_8bit", None), ("paged_adamw_8bit", 32)):
        peak = peak_of(name, {} if budget is None else {"fast_bytes": budget * MB})
        label = name if budget is None else f"{name}, {budget} MB"
        print(f"peak of {label}: {peak / MB:.0f} MB, {(everything - peak) / MB:.0f} MB less")


if __name__ == "__main__":
    main()

"""Training steps of an adapter against PEFT + bitsandbytes, in turn, a process for each run.

    python -m benchmarks.training MODEL_NF4 MODEL_16BIT [CASE ...] [--turns 3] [--data FILE]

Both train rank 16 on all linear layers of the same model with the same tokens in bfloat16 and step
AdamW; the peer is `get_peft_model` over transformers with bitsandbytes' NF4 and double quantization
under autocast. A figure is the median of ratios within a turn; peak memory is the largest
resident set that the system counted for the process, seen from outside. Cases:

    4x512, 1x2048, 1x512   documents and their tokens, loss on all; target tokens a second
    ...-recompute          the same with every layer's activations computed again
    ...-fp32               both compute in float32: faster for the peer without 16-bit instructions
    ...-lora               ours on 4 bits against ours on the 16-bit base
                           (these can be joined: 4x512-recompute-fp32)
    e2e                    rows of --data (prompt and completion) in batches of 8, the peer's
                           padded to the longest, ours packed
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness import RESULTS, describe_machine
from benchmarks.processes import run_alone

CASES = ("4x512", "1x2048", "4x512-recompute", "4x512-lora", "e2e")


@dataclass(frozen=True, slots=True)
class Run:
    """One process.

    Attributes:
        rate: Target tokens a second, over all steps but the first.
        peak_mib: Its largest resident set.
    """

    rate: float
    peak_mib: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One case: medians, and the peer's figures against ours."""

    case: str
    ours_rate: float
    peer: str
    peer_rate: float
    speedup: float
    ours_peak_mib: float
    peer_peak_mib: float
    idle_mib: float

    def row(self) -> str:
        """As Markdown."""
        part = self.ours_peak_mib / self.peer_peak_mib
        return (
            f"| {self.case} | {self.ours_rate:.0f} tok/s, {self.ours_peak_mib:.0f} MiB "
            f"({self.ours_peak_mib - self.idle_mib:.0f} above torch alone) | {self.peer}: "
            f"{self.peer_rate:.0f} tok/s, {self.peer_peak_mib:.0f} MiB | {self.speedup:.2f}x | "
            f"{part:.0%} |"
        )


def run(kind: str, *arguments: str) -> Run:
    """Start a process, wait for it, and ask the system what it took.

    Raises:
        RuntimeError: It failed.
    """
    module = "benchmarks.training_peer" if kind == "peer" else "benchmarks.training_ours"
    finished = run_alone(sys.executable, "-m", module, *arguments)
    steps = json.loads(finished.lines[-1])[1:]
    rate = sum(targets for targets, _ in steps) / sum(seconds for _, seconds in steps)
    return Run(rate, finished.peak / 2**20)


def idle_mib() -> float:
    """Of an interpreter that has imported torch, and done nothing."""
    return run_alone(sys.executable, "-c", "import torch").peak / 2**20


def compare(case: str, options: argparse.Namespace) -> Comparison:
    """Take turns."""
    shape, *variants = case.split("-")
    common = [f"--steps={options.steps}"]
    common += [f"--data={options.data}"] if shape == "e2e" else [f"--shape={shape}"]
    common += ["--recompute"] if "recompute" in variants else []
    common += ["--dtype=float32"] if "fp32" in variants else []
    four_bits, sixteen_bits = str(options.model_nf4), str(options.model_16bit)
    pairs = []
    for _ in range(options.turns):
        ours = run("ours", four_bits, *common)
        other = (
            run("ours", sixteen_bits, *common)
            if "lora" in variants
            else run("peer", sixteen_bits, *common)
        )
        pairs.append((ours, other))
        print(case, ours, other, file=sys.stderr, flush=True)
    return Comparison(
        case=case,
        ours_rate=statistics.median(o.rate for o, _ in pairs),
        peer="halfbyte lora" if "lora" in variants else "PEFT + bitsandbytes",
        peer_rate=statistics.median(p.rate for _, p in pairs),
        speedup=statistics.median(o.rate / p.rate for o, p in pairs),
        ours_peak_mib=statistics.median(o.peak_mib for o, _ in pairs),
        peer_peak_mib=statistics.median(p.peak_mib for _, p in pairs),
        idle_mib=idle_mib(),
    )


def main() -> None:
    """Measure the cases, print the table, save it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("model_nf4", type=Path)
    parser.add_argument("model_16bit", type=Path)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of a run, the first not counted")
    parser.add_argument("--data", type=Path, help="for e2e")
    parser.add_argument("--name", default="training", help="of the file of results")
    options = parser.parse_args()
    machine = describe_machine()
    rows = []
    print("| case | halfbyte | other | speed | memory |\n|---|---|---|---|---|")
    for case in options.cases:
        rows.append(compare(case, options))
        print(rows[-1].row(), flush=True)
        record = {
            "command": " ".join(["python -m benchmarks.training", *sys.argv[3:]]),
            "machine": asdict(machine),
            "rows": [asdict(row) for row in rows],
        }
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (RESULTS / f"{options.name}.json").write_text(text)


if __name__ == "__main__":
    main()

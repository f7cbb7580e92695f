"""`python -m benchmarks [subject ...]`: measure, print tables, write `benchmarks/results/`."""

import argparse
import sys
import time
import warnings

import torch

from benchmarks import harness
from halfbyte.kernels import backends


def main() -> int:
    """Run the subjects that the command line names; every one without names."""
    warnings.simplefilter("ignore")  # of the peers
    from benchmarks import attention, kernels  # noqa: PLC0415  (imports the peers)

    subjects = {subject.name: subject for subject in (*kernels.SUBJECTS, *attention.SUBJECTS)}
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="subject", help=", ".join(subjects))
    parser.add_argument("--turns", type=int, default=11, help="turns that the ways take")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and its time on the processor: for a machine that others use",
    )
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.subjects if name not in subjects]:
        parser.error(f"unknown subjects {unknown}; known: {', '.join(subjects)}")
    torch.set_num_threads(1 if arguments.cpu_time else arguments.threads)
    if arguments.cpu_time:
        harness.CLOCK.read = time.thread_time

    machine = harness.describe_machine()
    for status in backends.status():
        print(f"{status.name}: {'in use' if status.in_use else 'not in use'}, {status.reason}")
    print(
        f"{machine.cpu}, {machine.threads} threads: read {machine.read_rate / 1e9:.0f} GB/s, "
        f"write {machine.write_rate / 1e9:.0f} GB/s, "
        f"matmul {machine.matmul_rate / 1e9:.0f} GFLOP/s\n"
    )
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    red = False
    for name in arguments.subjects or subjects:
        subject = subjects[name]
        try:
            subject.gate()
        except harness.GateError as error:
            print(f"{name}: RED GATE, nothing is measured: {error}", file=sys.stderr)
            red = True
            continue
        rows = subject.measure(machine, arguments.turns)
        suffix = "-cpu-time" if arguments.cpu_time else ""
        path = harness.save(subject, rows, machine, command, suffix)
        print(harness.table(subject, rows), f"\n\n({path})\n", flush=True)
    return int(red)


if __name__ == "__main__":
    sys.exit(main())

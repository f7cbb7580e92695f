"""`python -m halfbyte` and the `halfbyte` script."""

import os
import sys

from halfbyte.cli.app import run

SPINS = "2000"


def main() -> int:
    """Run the command line of this process and return its exit code.

    Threads that wait for each other spin for microseconds, then sleep, unless the environment says
    otherwise. OpenMP's default is to spin for milliseconds, and then one busy process beside a
    training run slows it several times; never to spin costs decoding half its speed.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch loads OpenMP, later
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

"""`python -m halfbyte` and the `halfbyte` script."""

import os
import sys

from halfbyte.cli.app import run


def main() -> int:
    """Run the command line of this process and return its exit code.

    Threads that wait for each other sleep, unless the environment says otherwise: OpenMP's default
    is to spin, and then one busy process beside a training run slows it several times.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP, later
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

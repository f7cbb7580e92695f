"""`python -m halfbyte` and the `halfbyte` script."""

import sys

from halfbyte.cli.app import run


def main() -> int:
    """Run the command line of this process and return its exit code."""
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

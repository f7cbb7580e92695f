"""Comparisons with the peers, side by side in one process. Run `python -m benchmarks --help`."""

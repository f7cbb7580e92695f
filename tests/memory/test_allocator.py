"""Freed memory leaves the process."""

import subprocess
import sys

# In a process of its own: in one that has run for long, blocks find room in holes of the heap.
FREE_EVERY_OTHER = """
import torch
from halfbyte.memory.allocator import return_freed_memory
from halfbyte.memory.resident import private_bytes

assert return_freed_memory()
blocks = [torch.ones(2**18) for _ in range(100)]  # 1 MiB each
held = private_bytes()
del blocks[::2]
print(held - private_bytes())
"""

FREE_IN_A_HOLE = """
import torch
from halfbyte.memory.allocator import return_freed_memory
from halfbyte.memory.resident import private_bytes

small = [bytearray(50_000) for _ in range(4000)]  # 200 MB in the heap
last = bytearray(50_000)
del small
assert return_freed_memory()
before = private_bytes()
block = torch.ones(25 * 2**18)  # 25 MiB: fits in the hole
held = private_bytes()
assert held - before > 24 * 2**20
del block
print(held - private_bytes())
"""


def freed_by(script: str) -> int:
    command = [sys.executable, "-c", script]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_what_is_freed_between_other_blocks_is_given_back() -> None:
    # 50 MiB were freed in holes; the counters of the kernel may lag by a few hundred KB.
    assert freed_by(FREE_EVERY_OTHER) > 48 * 2**20


def test_no_large_block_goes_where_small_ones_were() -> None:
    assert freed_by(FREE_IN_A_HOLE) > 24 * 2**20

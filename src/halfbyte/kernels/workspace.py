"""The buffer that weights are decoded into when many rows are multiplied.

One buffer serves every layer; calls that run at the same time take one each. A weight larger than
the limit is decoded and multiplied in pieces. All functions may be called from any thread.
"""

import torch

from halfbyte.errors import UsageError
from halfbyte.kernels import backends


def held_bytes() -> int:
    """Bytes that the buffers occupy, in use or idle; 0 without native kernels."""
    return int(torch.ops.halfbyte.workspace_bytes()) if backends.native_in_use() else 0


def release() -> None:
    """Give idle buffers back to the system. The next multiplication allocates again."""
    if backends.native_in_use():
        torch.ops.halfbyte.release_workspace()


def limit_bytes() -> int:
    """The most bytes that a call decodes at once; one row or column of a weight is never cut."""
    return int(torch.ops.halfbyte.workspace_limit()) if backends.native_in_use() else 0


def set_limit_bytes(limit: int) -> None:
    """Change the limit for calls from now on.

    The forward result is the same for any limit where PyTorch's matmul is; buffers above the
    limit stay until `release`.

    Raises:
        UsageError: `limit` is not positive.
    """
    if limit < 1:
        raise UsageError(f"workspace limit: at least 1 byte expected, found {limit}")
    if backends.native_in_use():
        torch.ops.halfbyte.set_workspace_limit(limit)

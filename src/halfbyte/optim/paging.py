"""Where paged state goes, and how much of it stays."""

from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.activations import lent_buffer
from halfbyte.memory.device import CudaStreams, PinnedHostTier
from halfbyte.memory.pool import Pool
from halfbyte.memory.tiers import FileTier, Tier


@dataclass(frozen=True, slots=True)
class Paging:
    """Settings of a pool.

    Attributes:
        fast_bytes: Budget of state in fast memory: RAM for parameters on a CPU, device memory on a
            GPU.
        directory: For the file of a CPU's slow tier; on a disk. By default TMPDIR, else /var/tmp.
        page_bytes: What moves at a time; by default up to 4 MiB, as the budget allows.
    """

    fast_bytes: int
    directory: Path | None = None
    page_bytes: int | None = None

    def pool(self, device: torch.device) -> Pool:
        """An empty pool for parameters on that device.

        Raises:
            UsageError: The budget has no room for two pages, or the directory is not on a disk.
            UnsupportedError: There is no slow tier for such a device.
        """
        tier: Tier
        if device.type == "cpu":
            tier = FileTier(self.directory, allocate=lent_buffer)
        elif device.type == "cuda":
            tier = PinnedHostTier(CudaStreams(device))
        else:
            raise UnsupportedError(
                f"no paging for parameters on {device}; it is there for cpu and cuda"
            )
        return Pool(tier, fast_bytes=self.fast_bytes, page_bytes=self.page_bytes)

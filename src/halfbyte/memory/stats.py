"""What a pool holds and has moved."""

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Figures of a pool; the counters run from its beginning.

    Attributes:
        fast_bytes: The budget.
        total_bytes: All pages.
        resident_bytes: Fast buffers now.
        peak_resident_bytes: The most there were.
        paged_in_bytes: Read from the slow tier.
        paged_out_bytes: Written to it.
        stall_seconds: How long the owner waited for transfers.
        hits: Pages that were in the fast tier already, or were new.
        prefetched: Pages that arrived while others were worked on.
        misses: Pages that had to be waited for.
        cached_bytes: RAM in which the kernel caches the slow tier; None when it cannot be told.
        slow_tier: What it is.
    """

    fast_bytes: int = 0
    total_bytes: int = 0
    resident_bytes: int = 0
    peak_resident_bytes: int = 0
    paged_in_bytes: int = 0
    paged_out_bytes: int = 0
    stall_seconds: float = 0.0
    hits: int = 0
    prefetched: int = 0
    misses: int = 0
    cached_bytes: int | None = 0
    slow_tier: str = "none"

    def since(self, earlier: "PoolStats") -> "PoolStats":
        """The same, with counters that start at an earlier reading."""
        return replace(
            self,
            paged_in_bytes=self.paged_in_bytes - earlier.paged_in_bytes,
            paged_out_bytes=self.paged_out_bytes - earlier.paged_out_bytes,
            stall_seconds=self.stall_seconds - earlier.stall_seconds,
            hits=self.hits - earlier.hits,
            prefetched=self.prefetched - earlier.prefetched,
            misses=self.misses - earlier.misses,
        )

    def record(self) -> dict[str, int | float | str | None]:
        """The figures by name, for a metrics file."""
        return asdict(self)

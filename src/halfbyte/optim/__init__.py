"""Stepping: AdamW and others with 32- or 8-bit state, resident or paged, as torch optimizers."""

from halfbyte.optim.factory import NAMES, Footprint, footprint, make_optimizer, weight_decay_groups
from halfbyte.optim.optimizer import StatefulOptimizer
from halfbyte.optim.optimizers import SGD, AdamW, AdamW8bit, Lion, PagedAdamW, PagedAdamW8bit
from halfbyte.optim.paging import Paging

__all__ = [
    "NAMES",
    "SGD",
    "AdamW",
    "AdamW8bit",
    "Footprint",
    "Lion",
    "PagedAdamW",
    "PagedAdamW8bit",
    "Paging",
    "StatefulOptimizer",
    "footprint",
    "make_optimizer",
    "weight_decay_groups",
]

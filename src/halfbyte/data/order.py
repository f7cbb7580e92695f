"""A shuffle that is a pure function of seed and epoch, the same on every version of anything.

Numbers are ordered by a keyed hash: splitmix64, a bijection on 64 bits, so that no two numbers
have the same hash and ties cannot occur.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def shuffled(count: int, *, seed: int, epoch: int, purpose: str) -> NDArray[np.int64]:
    """The numbers below `count` in a random order, int64 `[count]`.

    Args:
        count: How many.
        seed: Any whole number.
        epoch: Any whole number; another epoch is another order.
        purpose: Keeps the orders of different things apart.
    """
    name = f"{purpose}/{seed}/{epoch}".encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=8).digest(), dtype="<u8")
    # Arithmetic on uint64 arrays wraps around, as the hash wants it.
    hashes = key + np.arange(1, count + 1, dtype=np.uint64) * _INCREMENT
    hashes = (hashes ^ (hashes >> np.uint64(30))) * _FIRST
    hashes = (hashes ^ (hashes >> np.uint64(27))) * _SECOND
    hashes ^= hashes >> np.uint64(31)
    return np.argsort(hashes, kind="stable")

"""One hash that names the contents of a set of tensors, wherever and however they are stored.

Semantics, in sha256 over these bytes, numbers as 8 bytes little-endian:
    "halfbyte tensors 1" and a line feed, the number of tensors
    for each tensor, sorted by the UTF-8 bytes of its name:
        length of the name, the name, length of the dtype, the dtype ("float32", "uint8", ...)
        number of dimensions, each dimension, number of bytes of the values,
        the values in row-major order, each little-endian
"""

import hashlib
import struct
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError, UsageError

PREFIX = b"halfbyte tensors 1\n"


class Fingerprint:
    """The fingerprint of tensors that come one at a time, in the order of their names.

    Args:
        num_tensors: How many will come.

    Raises:
        UnsupportedError: A big-endian machine.
    """

    def __init__(self, num_tensors: int) -> None:
        if sys.byteorder != "little":
            raise UnsupportedError("fingerprints need a little-endian machine")
        self._digest = hashlib.sha256(PREFIX + struct.pack("<Q", num_tensors))
        self._left = num_tensors
        self._last = b""

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor.

        Raises:
            UsageError: Its name does not come after the one before, or there are too many.
        """
        label, dtype = name.encode(), str(tensor.dtype).removeprefix("torch.").encode()
        if not self._left or (self._last and label <= self._last):
            raise UsageError(f"fingerprint: {name!r} is out of order, or one too many")
        self._left -= 1
        self._last = label
        digest = self._digest
        digest.update(struct.pack("<Q", len(label)) + label)
        digest.update(struct.pack("<Q", len(dtype)) + dtype)
        digest.update(struct.pack(f"<{tensor.dim() + 1}Q", tensor.dim(), *tensor.shape))
        values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(struct.pack("<Q", values.nbytes))
        digest.update(values.data)

    def hexdigest(self) -> str:
        """64 hexadecimal digits.

        Raises:
            UsageError: Tensors are missing.
        """
        if self._left:
            raise UsageError(f"fingerprint: {self._left} tensors are missing")
        return self._digest.hexdigest()


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint, 64 hexadecimal digits.

    Tensors are taken from the mapping one at a time, so that one that reads files on access is
    never in memory as a whole.

    Raises:
        UnsupportedError: A big-endian machine.
    """
    fingerprint = Fingerprint(len(tensors))
    for name in sorted(tensors, key=str.encode):
        fingerprint.add(name, tensors[name])
    return fingerprint.hexdigest()

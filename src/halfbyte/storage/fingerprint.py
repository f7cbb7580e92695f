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

from halfbyte.errors import UnsupportedError

PREFIX = b"halfbyte tensors 1\n"


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint, 64 hexadecimal digits.

    Tensors are taken from the mapping one at a time, so that one that reads files on access is
    never in memory as a whole.

    Raises:
        UnsupportedError: A big-endian machine.
    """
    if sys.byteorder != "little":
        raise UnsupportedError("fingerprints need a little-endian machine")
    digest = hashlib.sha256(PREFIX + struct.pack("<Q", len(tensors)))
    for name in sorted(tensors, key=str.encode):
        tensor = tensors[name].detach()
        label, dtype = name.encode(), str(tensor.dtype).removeprefix("torch.").encode()
        digest.update(struct.pack("<Q", len(label)) + label)
        digest.update(struct.pack("<Q", len(dtype)) + dtype)
        digest.update(struct.pack(f"<{tensor.dim() + 1}Q", tensor.dim(), *tensor.shape))
        values = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(struct.pack("<Q", values.nbytes))
        digest.update(values.data)
    return digest.hexdigest()

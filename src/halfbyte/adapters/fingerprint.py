"""What an adapter computes, as one hash."""

import torch
from torch import Tensor

from halfbyte.adapters.adapter import Adapter
from halfbyte.storage.fingerprint import fingerprint_tensors


def fingerprint_adapter(adapter: Adapter) -> str:
    """64 hexadecimal digits over factors and scalings, whatever their files look like.

    The tensors are `<module path>.lora_A`, `.lora_B` and `.scaling` (one float64), hashed as
    `storage.fingerprint` says.
    """
    tensors: dict[str, Tensor] = {}
    for path, update in adapter.modules.items():
        tensors[f"{path}.lora_A"] = update.a_RI
        tensors[f"{path}.lora_B"] = update.b_OR
        tensors[f"{path}.scaling"] = torch.tensor([update.scaling], dtype=torch.float64)
    return fingerprint_tensors(tensors)

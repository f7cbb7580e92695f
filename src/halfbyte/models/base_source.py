"""A model directory as a source whose 4-bit weights are seen decoded.

What is merged with adapters, or otherwise made into another model, starts here. `models.sources`
refuses such directories, because quantizing twice is a mistake.
"""

import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.errors import MissingFileError
from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.formats.shards import MappedShards, Shards, open_shards
from halfbyte.layers.weights import Weight, WeightRef
from halfbyte.models.config import parse_config
from halfbyte.models.layout import layout_of
from halfbyte.models.sources import Source, read_companions, require_no_code
from halfbyte.models.stores import MappedStore, open_mapped
from halfbyte.storage.fingerprint import Fingerprint
from halfbyte.storage.json_file import read_json_object


class BaseTensors:
    """The weights of a model directory, 4-bit ones decoded to float32 without rounding again.

    Attributes:
        shapes: Name -> shape, of exactly the tensors that the config describes.
        num_bytes: Of all files.
    """

    def __init__(self, store: MappedStore, refs: Mapping[str, WeightRef]) -> None:
        self._store = store
        self._refs = refs
        self.shapes = {name: ref.shape for name, ref in refs.items()}
        self.num_bytes = sum(map(store.size, refs))

    def size(self, name: str) -> int:
        """Bytes in the files."""
        return self._store.size(name)

    def stored(self, name: str) -> Weight:
        """The weight as it is stored, over the pages of its file."""
        return self._store.acquire(self._refs[name])

    def read(self, name: str) -> Tensor:
        """The weight; float32 if it is stored in 4 bits, else over the pages of its file."""
        weight = self.stored(name)
        if isinstance(weight, QuantizedTensor):
            return weight.dequantize(dtype=torch.float32)
        return weight

    def release(self, name: str) -> None:
        """Give the pages back."""
        self._store.forget(name)

    def quantized(self) -> dict[str, QuantizedTensor]:
        """The weights that are stored in 4 bits."""
        found = {name: self.stored(name) for name in self._refs}
        return {name: w for name, w in found.items() if isinstance(w, QuantizedTensor)}


def open_base(directory: Path) -> tuple[Source, BaseTensors]:
    """Open a model directory, 4-bit or not. Costs headers only; code in it is never run.

    Returns:
        The source, and its tensors once more under their own type.

    Raises:
        MissingFileError: The directory or a file of it is missing.
        UnsafeArtifactError: It asks for code to be run, or a name in it points outside.
        UnsupportedError: An unknown family.
        FormatError: Config or tensors are not valid; all faults are listed.
    """
    if not directory.is_dir():
        raise MissingFileError(
            f"{directory} is not a directory",
            hint="A GGUF file or a hub id: `halfbyte quantize` turns it into a model directory.",
        )
    config = read_json_object(directory / "config.json")
    require_no_code(config, directory)
    files, generation = read_companions(directory)
    layout = layout_of(parse_config(config, generation, where=f"{directory / 'config.json'}"))
    store = open_mapped(open_shards(directory), layout)
    tensors = BaseTensors(store, {ref.name: ref for ref in layout.refs()})
    description = {"kind": "directory", "name": directory.resolve().name}
    return Source(tensors, config, generation, files, description), tensors


def measure_fingerprint(shards: Shards) -> str:
    """The fingerprint of all tensors as stored, read one at a time over pages that are given back.

    Raises:
        FormatError: A file changed since it was opened.
    """
    mapped = MappedShards(shards)
    fingerprint = Fingerprint(len(shards))
    for name in sorted(shards, key=str.encode):
        fingerprint.add(name, mapped.tensor(name))
        mapped.home(name).advise(name, mmap.MADV_DONTNEED)
    return fingerprint.hexdigest()

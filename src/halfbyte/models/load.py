"""Opening a model directory as a decoder: milliseconds, because nothing is read ahead of use."""

from pathlib import Path

import torch

from halfbyte.errors import MissingFileError, UsageError
from halfbyte.formats.checks import FLOAT_DTYPES, dtype_name
from halfbyte.formats.shards import open_shards
from halfbyte.models.config import read_config
from halfbyte.models.decoder import Decoder
from halfbyte.models.layout import layout_of
from halfbyte.models.stores import open_mapped

DEFAULT_COMPUTE_DTYPE = torch.bfloat16


def load_decoder(
    directory: str | Path,
    *,
    compute_dtype: torch.dtype = DEFAULT_COMPUTE_DTYPE,
    resident: bool = False,
) -> Decoder:
    """Open a Hugging Face model directory, 4-bit or not. Code in it is never run.

    Args:
        directory: Holds `config.json` and safetensors.
        compute_dtype: float32, bfloat16 or float16.
        resident: Copy the weights to memory, in `compute_dtype`, instead of mapping the files.
            Worth it for weights that are not in 4 bits and have another dtype on disk.

    Raises:
        MissingFileError: The directory or a file of it is missing.
        UnsupportedError: Unknown family.
        UnsafeArtifactError: A name in it points outside.
        FormatError: Config or tensors are not valid; all faults are listed.
        UsageError: `compute_dtype` cannot be computed in.
    """
    directory = Path(directory)
    if compute_dtype not in FLOAT_DTYPES:
        allowed = ", ".join(dtype_name(d) for d in FLOAT_DTYPES)
        raise UsageError(
            f"compute_dtype: one of {allowed} expected, found {dtype_name(compute_dtype)}"
        )
    if not directory.is_dir():
        raise MissingFileError(
            f"{directory} is not a directory",
            hint="A GGUF file or a hub id: `halfbyte quantize` turns it into a model directory.",
        )
    config = read_config(directory)
    mapped = open_mapped(open_shards(directory), layout_of(config))
    store = mapped.resident(compute_dtype) if resident else mapped
    return Decoder(config, store, compute_dtype=compute_dtype)

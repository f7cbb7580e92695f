"""What a run will write, known before it starts."""

import shutil
from pathlib import Path

from halfbyte.adapters.spec import resolve_targets
from halfbyte.errors import DoesNotFitError
from halfbyte.models.decoder import Decoder
from halfbyte.models.layout import layout_of
from halfbyte.training.config import Config
from halfbyte.training.methods import COMPUTE_DTYPES
from halfbyte.training.plan import DiskNeed
from halfbyte.training.probing import nearest_directory

_SMALL_FILES = 4 * 10**6  # metrics, picture, tokenizer, manifests
_FLOAT = 4
_STATE_BYTES = {32: 8.0, 8: 2.0 + 2 * 4 / 256}  # two moments; a scale for each 256 in 8 bits


def trained_elements(config: Config, base: Decoder) -> int:
    """How many numbers the method trains."""
    if config.training.method == "full":
        return sum(_product(ref.shape) for ref in layout_of(base.config).refs())
    return sum(
        shape.rank * sum(base.linears[path].weight.shape)
        for path, shape in resolve_targets(config.lora, base.linears).items()
    )


def state_bytes(config: Config) -> float:
    """Of the optimizer, for each trained number."""
    return _STATE_BYTES[8 if config.optimizer.name.endswith("_8bit") else 32]


def disk_need(config: Config, base: Decoder) -> DiskNeed:
    """What will be written, and what is free on the disk of the run directory."""
    count = trained_elements(config, base)
    checkpoint = count * (_FLOAT + state_bytes(config))
    full = config.training.method == "full"
    dtype = COMPUTE_DTYPES[config.training.compute_dtype]
    directory = nearest_directory(Path(config.output.dir).absolute())
    return DiskNeed(
        checkpoints=round((config.training.keep_checkpoints + 1) * checkpoint),
        result=count * (dtype.itemsize if full else _FLOAT) + _SMALL_FILES,
        # State, and gradients as far as they are paged as well.
        paged=round(count * (_FLOAT + state_bytes(config))) if config.optimizer.paged else 0,
        free=shutil.disk_usage(directory).free,
    )


def require_disk(need: DiskNeed, directory: Path) -> None:
    """Check that everything can be written.

    Raises:
        DoesNotFitError: It cannot.
    """
    if need.total > need.free:
        raise DoesNotFitError(
            f"the disk of {directory} has {_megabytes(need.free)} free, the run writes "
            f"{_megabytes(need.total)}: checkpoints {_megabytes(need.checkpoints)}, result "
            f"{_megabytes(need.result)}, paged state {_megabytes(need.paged)}",
            hint="Choose another output.dir, or lower training.keep_checkpoints.",
        )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product

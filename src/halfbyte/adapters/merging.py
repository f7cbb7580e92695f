"""An adapter added to the weights of its base: an ordinary model in 16 or 32 bits.

Each weight is decoded, the update `scaling * B A` added in float32, and the sum rounded once.
Weights pass one at a time, so memory does not grow with the model. The directory is there whole or
not at all.

Dimension key: R rank, I input features, O output features.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import halfbyte
from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.merge_inputs import MergeInputs, open_merge
from halfbyte.errors import UsageError
from halfbyte.formats.checks import dtype_name
from halfbyte.formats.shards import DEFAULT_SHARD_BYTES
from halfbyte.models.quantization_plan import Item, plan_weights
from halfbyte.models.quantization_run import kept_tensor
from halfbyte.models.record import RECORD
from halfbyte.models.sources import json_bytes, require_apart
from halfbyte.models.weight_writing import Progress, Written, write_weights
from halfbyte.storage.atomic import check_free_space, new_directory

DENSE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Names of the dtypes that a merge which does not quantize can have."""

RECORD_VERSION = 1


@dataclass(frozen=True, slots=True)
class WeightChange:
    """What merging did to one weight; all are Frobenius norms.

    Attributes:
        path: Of the linear layer.
        update: Norm of the update over that of the weight it was added to.
        rounding: Norm of what rounding the sum changed over that of the update.
        base_difference: How far the weights that took the update are from the base's, over the
            norm of the base's; None where they are the base's.
    """

    path: str
    update: float
    rounding: float
    base_difference: float | None

    def to_json(self) -> dict[str, str | float | None]:
        """By field."""
        return {
            "path": self.path,
            "update": self.update,
            "rounding": self.rounding,
            "base_difference": self.base_difference,
        }


@dataclass(frozen=True, slots=True)
class MergedModel:
    """A directory that holds a merged model.

    Attributes:
        path: The directory.
        fingerprint: Of its tensors.
        base_fingerprint: Of the base's.
        nbytes: Of its tensors.
        changes: By weight, in the order of names.
    """

    path: Path
    fingerprint: str
    base_fingerprint: str
    nbytes: int
    changes: tuple[WeightChange, ...]


def merge_dense(
    model: str | Path,
    adapter: str | Path | Adapter,
    out: str | Path,
    *,
    dtype: str = "bf16",
    base_weights: str | Path | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    replace: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> MergedModel:
    """Write the base with the adapter added to it as a model of one dtype.

    Args:
        model: Directory of the base, 4-bit or not.
        adapter: Directory of an adapter or a stack, or the adapter itself.
        out: Where to write; must not exist, unless `replace`.
        dtype: `bf16`, `fp16` or `fp32`, of every tensor.
        base_weights: Add the update to these 16-bit weights instead of the decoded base: the model
            that the base was quantized from. It is not what the adapter was trained on.
        shard_bytes: What one file may hold.
        replace: Put the result in the place of an older directory.
        progress: Called after each tensor.

    Raises:
        UsageError: Unknown dtype, or `out` and an input contain each other.
        HalfbyteError: The inputs do not belong together; see `open_merge`.
        FormatError: `dtype` cannot hold a value.
        StorageError: `out` exists, or the disk has not enough space. Nothing is left there.
    """
    stored = dense_dtype(dtype)
    require_apart(Path(out), model, *_paths(adapter, base_weights))
    inputs = open_merge(model, adapter, base_weights=base_weights)
    with new_directory(out, replace=replace) as directory:
        merging, written = write_dense(
            directory, inputs, stored, shard_bytes=shard_bytes, progress=progress
        )
        write_companions(directory, inputs, written.fingerprint, {"dtype": dtype}, dtype=stored)
    return MergedModel(
        Path(out), written.fingerprint, inputs.fingerprint, written.nbytes, merging.changes
    )


def dense_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        UsageError: There is none.
    """
    if name not in DENSE_DTYPES:
        raise UsageError(f"dtype: one of {', '.join(DENSE_DTYPES)} expected, found {name!r}")
    return DENSE_DTYPES[name]


def write_dense(
    directory: Path,
    inputs: MergeInputs,
    dtype: torch.dtype,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[Progress], None] | None = None,
) -> tuple["DenseMerge", Written]:
    """Write the merged weights into a directory that exists; see `merge_dense`."""
    plan = plan_weights(inputs.source, None, dtype, shard_bytes=shard_bytes)
    check_free_space(directory, plan.num_bytes)
    merging = DenseMerge(inputs, dtype)
    return merging, write_weights(directory, inputs.weights, plan, merging, progress=progress)


class DenseMerge:
    """Converts each weight of the base to the merged one; may be called from several threads."""

    def __init__(self, inputs: MergeInputs, dtype: torch.dtype) -> None:
        self._inputs = inputs
        self._dtype = dtype
        self._changes: dict[str, WeightChange] = {}

    @property
    def changes(self) -> tuple[WeightChange, ...]:
        """Of the adapted weights so far, in the order of names."""
        return tuple(self._changes[name] for name in sorted(self._changes, key=str.encode))

    def __call__(self, item: Item) -> Mapping[str, Tensor]:
        """The merged tensor.

        Raises:
            FormatError: It holds a NaN or an infinity, before or after.
        """
        name, path = item.name, item.name.removesuffix(".weight")
        weight = self._inputs.weights.read(name)
        update = self._inputs.adapter.modules.get(path)
        if update is None:
            return {name: kept_tensor(weight, self._dtype, name)}
        exact = merged_weight(weight, update)
        kept = kept_tensor(exact, self._dtype, name)
        size = update_norm(update)
        rounded = _ratio(float((kept.float() - exact).norm()), size)
        self._changes[name] = WeightChange(
            path, _ratio(size, float(weight.float().norm())), rounded, self._difference(name)
        )
        return {name: kept}

    def _difference(self, name: str) -> float | None:
        if self._inputs.original is None:
            return None
        base = self._inputs.base_tensors.read(name).float()
        distance = float((self._inputs.weights.read(name).float() - base).norm())
        self._inputs.base_tensors.release(name)
        return _ratio(distance, float(base.norm()))


def merged_weight(weight_OI: Tensor, update: LoraUpdate) -> Tensor:
    """`W + scaling * B A` in float32."""
    return torch.addmm(weight_OI.float(), update.b_OR, update.a_RI, alpha=update.scaling)


def update_norm(update: LoraUpdate) -> float:
    """Frobenius norm of `scaling * B A`, from products of the size of the rank."""
    a_RI, b_OR = update.a_RI.double(), update.b_OR.double()
    squared = float(((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum())
    return abs(update.scaling) * math.sqrt(max(squared, 0.0))


def write_companions(
    directory: Path,
    inputs: MergeInputs,
    fingerprint: str,
    record: Mapping[str, object],
    *,
    dtype: torch.dtype,
    quantization: Mapping[str, object] | None = None,
) -> None:
    """Write everything beside the weights: config, tokenizer, and where the model comes from.

    Args:
        directory: Holds the weights.
        inputs: What was merged.
        fingerprint: Of the weights.
        record: What to note about the merge besides its inputs.
        dtype: Of what is not in 4 bits.
        quantization: `quantization_config` of a 4-bit model.
    """
    for name, content in inputs.source.files.items():
        (directory / name).write_bytes(content)
    dropped = ("torch_dtype", "quantization_config")
    config = {key: value for key, value in inputs.source.config.items() if key not in dropped}
    config["dtype"] = dtype_name(dtype)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (directory / "config.json").write_bytes(json_bytes(config))
    origin = {
        "version": RECORD_VERSION,
        "made_by": f"halfbyte {halfbyte.__version__}",
        "fingerprint": fingerprint,
        "merge": {**inputs.record(), **record},
    }
    (directory / RECORD).write_bytes(json_bytes(origin))


def _paths(adapter: str | Path | Adapter, base_weights: str | Path | None) -> list[str | Path]:
    given = [] if isinstance(adapter, Adapter) else [adapter]
    return given if base_weights is None else [*given, base_weights]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)

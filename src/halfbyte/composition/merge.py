"""Merge an adapter into its base, and say what that changed before anyone relies on it.

Every merge is measured on a probe text against the live model, 4-bit base with the adapter beside
it. One that is further off than its limits leaves no model, only the report.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from halfbyte.adapters.adapter import Adapter
from halfbyte.adapters.merge_inputs import MergeInputs, open_merge
from halfbyte.adapters.merging import DENSE_DTYPES
from halfbyte.composition.certificate import Certificate, Limits, MergeRefusedError
from halfbyte.composition.four_bit_merge import RESIDUAL_DIRECTORY
from halfbyte.composition.merge_job import MergeJob, Outcome, Progress, adapter_rank
from halfbyte.composition.texts import Text, Texts
from halfbyte.data.formats import AUTO, parse_format
from halfbyte.errors import UsageError
from halfbyte.formats.shards import DEFAULT_SHARD_BYTES
from halfbyte.memory.allocator import return_freed_memory
from halfbyte.models.sources import json_bytes, require_apart
from halfbyte.storage.atomic import new_directory, write_file

REPORT = "merge_report.json"
FOUR_BIT_DTYPES = ("nf4", "fp4")


@dataclass(frozen=True, slots=True)
class Merge:
    """A merged model that was written.

    Attributes:
        path: Its directory.
        fingerprint: Of its tensors.
        nbytes: Of its tensors.
        residual: Directory of the residual adapter, or None.
        certificate: What was measured.
        notes: What the user should know.
    """

    path: Path
    fingerprint: str
    nbytes: int
    residual: Path | None
    certificate: Certificate
    notes: tuple[str, ...]


def merge(
    model: str | Path,
    adapter: str | Path | Adapter,
    *,
    out: str | Path,
    dtype: str = "bf16",
    base_weights: str | Path | None = None,
    calibration: str | Path | None = None,
    probe: str | Path | None = None,
    data_format: str = AUTO,
    residual_rank: int = 0,
    limits: Limits | None = None,
    accept: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    replace: bool = False,
    progress: Progress | None = None,
) -> Merge:
    """Write base and adapter as one model, with a report of what that changed.

    Args:
        model: Directory of the base that the adapter was trained on.
        adapter: Directory of an adapter or a stack, or the adapter itself.
        out: Where to write; must not exist, unless `replace`.
        dtype: `bf16`, `fp16`, `fp32`, or `nf4`, `fp4` for a 4-bit model whose codes are chosen on
            the calibration text.
        base_weights: Add the adapter to these 16-bit weights instead of the decoded base.
        calibration: A text that is like what the model will read: the adapter's own training data
            is best. In any format that can be trained on; by default a short one of ours.
        probe: The text that the result is judged by; by default another short one of ours.
            Documents of it are left out of the calibration.
        data_format: How rows of these texts are read, as the setting `data.format` of a run.
        residual_rank: Keep a residual of this rank beside a 4-bit model, in `out/residual`.
        limits: Beyond these the merge is refused.
        accept: Write it nevertheless, and record that.
        shard_bytes: What one file may hold.
        replace: Put the result in the place of an older directory.
        progress: Called now and then.

    Raises:
        UsageError: A setting is not allowed.
        HalfbyteError: The inputs do not belong together; see `open_merge`.
        DataError: A text cannot be used.
        MergeRefusedError: The merge is beyond the limits; only the report was written, beside
            `out`.
        StorageError: `out` exists, or the disk has not enough space. Nothing is left there.
    """
    out = Path(out)
    _check_settings(dtype, residual_rank)
    require_apart(out, model, *(p for p in (adapter, base_weights) if isinstance(p, str | Path)))
    inputs = open_merge(model, adapter, base_weights=base_weights)
    _check_rank(residual_rank, inputs.adapter)
    texts = Texts.read(inputs.base, calibration, probe, parse_format(data_format))
    return_freed_memory()  # logits and searched weights come and go by the hundred
    begin = time.monotonic()
    try:
        with new_directory(out, replace=replace) as directory:
            job = MergeJob(
                inputs, directory, out, texts.probe, shard_bytes, progress or (lambda *_: None)
            )
            outcome = (
                job.dense(dtype)
                if dtype in DENSE_DTYPES
                else job.four_bit(dtype, texts.calibration, residual_rank)
            )
            details = _details(inputs, texts, dtype, outcome, time.monotonic() - begin)
            certificate = Certificate(
                outcome.live,
                outcome.strategies,
                outcome.chosen,
                limits or Limits(),
                accept,
                details,
            )
            certificate.require_passed(str(refused_report(out)))
            (directory / REPORT).write_bytes(json_bytes(certificate.to_json()))
    except MergeRefusedError as error:
        write_file(refused_report(out), json_bytes(error.certificate.to_json()))
        raise
    residual = out / RESIDUAL_DIRECTORY if residual_rank else None
    return Merge(
        out, outcome.fingerprint, outcome.nbytes, residual, certificate, _notes(inputs, texts)
    )


def refused_report(out: Path) -> Path:
    """Where the report of a refused merge is written."""
    return out.with_name(f"{out.name}-refused.json")


def _check_settings(dtype: str, residual_rank: int) -> None:
    problems = []
    if dtype not in (*DENSE_DTYPES, *FOUR_BIT_DTYPES):
        known = ", ".join((*DENSE_DTYPES, *FOUR_BIT_DTYPES))
        problems.append(f"dtype: one of {known} expected, found {dtype!r}")
    if residual_rank < 0:
        problems.append(f"residual_rank: at least 0 expected, found {residual_rank}")
    if residual_rank and dtype in DENSE_DTYPES:
        problems.append(f"residual_rank: {dtype} leaves no residual; only 4-bit merges do")
    if problems:
        raise UsageError("this merge is not possible", problems=problems)


def _check_rank(residual_rank: int, adapter: Adapter) -> None:
    rank = adapter_rank(adapter)
    if residual_rank >= rank and residual_rank:
        raise UsageError(
            f"residual_rank: less than the adapter's {rank} expected, found {residual_rank}",
            hint="A residual of that rank is the adapter: keep it beside the base unmerged.",
        )


def _details(
    inputs: MergeInputs, texts: Texts, dtype: str, outcome: Outcome, seconds: float
) -> dict[str, object]:
    """What the report says besides the measurements."""
    four_bit = dtype in FOUR_BIT_DTYPES
    return {
        "dtype": dtype,
        **inputs.record(),
        "fingerprint": outcome.fingerprint,
        "bytes": outcome.nbytes,
        "probe": _described(texts.probe),
        "calibration": _described(texts.calibration) if four_bit else None,
        "notes": list(_notes(inputs, texts)),
        "per_weight": outcome.weights,
        "seconds": round(seconds, 1),
    }


def _notes(inputs: MergeInputs, texts: Texts) -> tuple[str, ...]:
    """What the user should know of the weights and the texts."""
    return (*(() if inputs.original is None else inputs.original.notes), *texts.notes)


def _described(text: Text) -> dict[str, object]:
    return {
        "name": text.name,
        "fingerprint": text.dataset.fingerprint,
        "documents": len(text.dataset),
        "tokens": text.num_tokens,
        "targets": text.num_targets,
    }

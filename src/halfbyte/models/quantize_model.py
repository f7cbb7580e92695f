"""Quantize a model once, into a directory that is there whole or not at all.

The result is an ordinary Hugging Face directory: 4-bit weights under bitsandbytes' keys, the
matching `quantization_config`, tokenizer files and template, and `halfbyte.json`, which names the
base by its fingerprint and says how it was made. `models.weight_writing` has the work itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte import __version__
from halfbyte.formats.bitsandbytes_layout import quantization_config
from halfbyte.formats.checks import dtype_name
from halfbyte.formats.error_report import ModelErrorReport
from halfbyte.formats.shards import DEFAULT_SHARD_BYTES
from halfbyte.models.quantization_plan import Plan, Quantizer, kept_dtype, plan_quantization
from halfbyte.models.quantization_run import Quantization
from halfbyte.models.record import RECORD
from halfbyte.models.sources import Source, json_bytes, open_source, require_apart
from halfbyte.models.weight_writing import Progress, write_weights
from halfbyte.storage.atomic import check_free_space, new_directory

__all__ = ["Progress", "QuantizedModel", "quantize_model"]

REPORT = "error_report.json"
RECORD_VERSION = 1


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """What `quantize_model` made.

    Attributes:
        path: The directory.
        fingerprint: sha256 over all tensors; names this base for adapters.
        source_bytes: Bytes of the source's tensors.
        nbytes: Bytes of the result's tensors.
        num_quantized: Weights in 4 bits.
        num_kept: Tensors in 16 bits.
        notes: What the user should know.
        report: Errors tensor by tensor, if asked for.
    """

    path: Path
    fingerprint: str
    source_bytes: int
    nbytes: int
    num_quantized: int
    num_kept: int
    notes: tuple[str, ...]
    report: ModelErrorReport | None


def quantize_model(
    src: str | Path,
    out: str | Path,
    *,
    codebook: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    keep: Sequence[str] = (),
    report: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    replace: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> QuantizedModel:
    """Write `src` with its decoder layers' weights in 4 bits to the directory `out`.

    Args:
        src: A Hugging Face directory (safetensors or `.bin`), a GGUF file, or a hub id.
        out: Where to write; must not exist, unless `replace`.
        codebook: `nf4`, `fp4`, `int4` or `int4_affine`. transformers reads the first two.
        block_size: Elements per scale, a power of two from 32 to 4096.
        double_quant: Store the scales in 8 bits.
        keep: Patterns (`*`, `?`) of weights that stay in 16 bits, as embeddings, head and norms do.
        report: Also measure the error of every weight and write `error_report.json`.
        shard_bytes: What one file may hold.
        replace: Put the result in the place of an older directory.
        progress: Called after each tensor.

    Raises:
        MissingFileError: There is no such source.
        FormatError: The source is damaged, its tensors are not those of its config, or one holds a
            NaN or an infinity.
        UnsafeArtifactError: The source asks for code to be run.
        UnsupportedError: A family or format that is not known.
        UsageError: A setting is not allowed, or `out` lies inside `src`.
        StorageError: `out` exists, or the disk has not enough space. Nothing is left there.
    """
    quantizer = Quantizer(codebook, block_size, double_quant, tuple(keep))
    out = Path(out)
    require_apart(out, src)
    source = open_source(src)
    plan = plan_quantization(source, quantizer, shard_bytes=shard_bytes)
    check_free_space(out, plan.num_bytes + sum(map(len, source.files.values())))
    with new_directory(out, replace=replace) as directory:
        convert = Quantization(source.tensors, quantizer, kept_dtype(source), with_report=report)
        written = write_weights(directory, source.tensors, plan, convert, progress=progress)
        _write_companions(directory, source, plan, quantizer, written.fingerprint)
        model_report = ModelErrorReport(convert.reports) if report else None
        if model_report is not None:
            (directory / REPORT).write_bytes(json_bytes(model_report.to_json()))
    items = plan.items
    return QuantizedModel(
        path=out,
        fingerprint=written.fingerprint,
        source_bytes=source.tensors.num_bytes,
        nbytes=written.nbytes,
        num_quantized=sum(item.quantized for item in items),
        num_kept=sum(not item.quantized for item in items),
        notes=source.notes + _notes(plan),
        report=model_report,
    )


def _write_companions(
    directory: Path, source: Source, plan: Plan, quantizer: Quantizer, fingerprint: str
) -> None:
    """Everything beside the weights."""
    for name, content in source.files.items():
        (directory / name).write_bytes(content)
    skip = ("lm_head", *plan.kept_modules) if plan.kept_modules else None
    config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    config["dtype"] = dtype_name(kept_dtype(source))
    config["quantization_config"] = quantization_config(
        quantizer.book,
        block_size=quantizer.block_size,
        double_quant=quantizer.double_quant,
        compute_dtype=kept_dtype(source),
        skip_modules=skip,
    )
    (directory / "config.json").write_bytes(json_bytes(config))
    record = {
        "version": RECORD_VERSION,
        "made_by": f"halfbyte {__version__}",
        "fingerprint": fingerprint,
        "quantizer": asdict(quantizer),
        "source": dict(source.description),
    }
    (directory / RECORD).write_bytes(json_bytes(record))


def _notes(plan: Plan) -> tuple[str, ...]:
    if not plan.ignored:
        return ()
    return (f"left out, because the model computes them: {', '.join(plan.ignored[:3])}",)

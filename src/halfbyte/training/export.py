"""What a finished run leaves: an adapter or a stack with its provenance, or all weights."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import halfbyte
from halfbyte.adapters.peft_files import write_adapter
from halfbyte.adapters.stack import ON_TOP_OF, Stack, StackPart
from halfbyte.adapters.stack_files import write_stack
from halfbyte.errors import MissingFileError
from halfbyte.formats.safetensors_writer import SafetensorsWriter, TensorSpec
from halfbyte.models.record import RECORD
from halfbyte.storage.atomic import new_directory
from halfbyte.storage.json_file import read_json_object
from halfbyte.training.config import Config
from halfbyte.training.methods import COMPUTE_DTYPES, TrainedModel
from halfbyte.training.run_data import RunData

ADAPTER_DIRECTORY = "adapter"
MODEL_DIRECTORY = "model"
PROVENANCE_VERSION = 1

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
)


def provenance(
    config: Config,
    data: RunData,
    steps: int,
    below: Stack | None = None,
) -> dict[str, object]:
    """Where an adapter comes from, by fingerprints rather than by names."""
    base = _base_record(Path(config.model))
    return {
        "version": PROVENANCE_VERSION,
        "halfbyte": halfbyte.__version__,
        "base": {"path": config.model, **base},
        ON_TOP_OF: [] if below is None else below.below,
        "tokenizer": data.tokenizer,
        "data": {"train": config.data.train, "fingerprint": data.reading.fingerprint},
        "method": config.training.method,
        "steps": steps,
        "config": config.model_dump(mode="json"),
        "command": shlex.join(
            Path(sys.argv[0]).name if i == 0 else a for i, a in enumerate(sys.argv)
        ),
    }


def export_result(
    model: TrainedModel, config: Config, directory: Path, origin: Mapping[str, object]
) -> Path:
    """Write the adapter, the stack that it is on top of, or the model; whole or not at all.

    Returns:
        Where it is.
    """
    if model.adapter is not None:
        target = directory / ADAPTER_DIRECTORY
        adapter = model.adapter.to_adapter(config.model, origin)
        linears = list(model.decoder.linears)
        if model.below is None:
            write_adapter(adapter, target, linears=linears, replace=True)
        else:
            top = StackPart.of(directory.name, adapter)
            stack = Stack((*model.below.parts, top))
            write_stack(stack, target, linears=linears, replace=True)
        return target
    return _write_model(model, config, directory / MODEL_DIRECTORY, origin)


def _write_model(
    model: TrainedModel, config: Config, target: Path, origin: Mapping[str, object]
) -> Path:
    base = Path(config.model)
    dtype = COMPUTE_DTYPES[config.training.compute_dtype]
    with new_directory(target, replace=True) as directory:
        for name in _COMPANIONS:
            if (base / name).is_file():
                (directory / name).write_bytes((base / name).read_bytes())
        specs = {n: TensorSpec(dtype, tuple(t.shape)) for n, t in model.parameters.items()}
        path = directory / "model.safetensors"
        with SafetensorsWriter.open(path, specs, metadata={"format": "pt"}) as writer:
            for name, tensor in model.parameters.items():  # cast one at a time
                writer.write(name, tensor.detach().to(dtype))
        text = json.dumps(dict(origin), indent=2, sort_keys=True) + "\n"
        (directory / "provenance.json").write_text(text)
    return target


def _base_record(directory: Path) -> dict[str, object]:
    """What `halfbyte quantize` noted about the base; nothing for directories of others."""
    try:
        record = read_json_object(directory / RECORD)
    except MissingFileError:
        return {}
    return {key: record[key] for key in ("fingerprint", "quantizer") if key in record}

"""Adapter directories: PEFT's two files, plus `provenance.json`.

PEFT names a factor `base_model.model.<module path>.lora_A.weight` and keeps what the shapes do
not say (alpha, rsLoRA) in `adapter_config.json`. What we cannot apply faithfully - DoRA, biases,
modules saved whole, initialisations that changed the base - is refused with the reason.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.spec import LoraShape, pattern_matches
from halfbyte.errors import FormatError, UnsupportedError
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.storage.atomic import new_directory
from halfbyte.storage.json_file import read_json_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROVENANCE_FILE = "provenance.json"

Number = TypeVar("Number", int, float)

_PREFIX = "base_model.model."
_SUFFIXES = {".lora_A.weight": "a", ".lora_B.weight": "b"}
_MAX_PATTERN, _MAX_REPETITIONS = 256, 3

_ABSENT: dict[str, object] = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
}
"""PEFT keys that change what an adapter computes -> the value with which they do not."""

_BASE_CHANGING_INITS = ("pissa", "loftq", "olora", "corda", "lora_ga")


def read_adapter(directory: str | Path) -> Adapter:
    """Read an adapter in PEFT's layout.

    Args:
        directory: Holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        Factors in float32, with alpha folded per layer from the config and its patterns.

    Raises:
        MissingFileError: A file is absent.
        UnsupportedError: The adapter holds more than plain LoRA; lists everything.
        FormatError: The files contradict each other or themselves; lists everything.
    """
    directory = Path(directory)
    config = read_json_object(directory / CONFIG_FILE)
    _refuse_unsupported(config, directory)
    weights = SafetensorsFile.open(directory / WEIGHTS_FILE)
    tensors = {name: weights.read(name) for name in weights.entries}
    modules = _modules(tensors, config, directory)
    provenance = directory / PROVENANCE_FILE
    return Adapter(
        modules=modules,
        base_model=str(config.get("base_model_name_or_path") or ""),
        dropout=_number(config, "lora_dropout", 0.0, directory),
        provenance=read_json_object(provenance) if provenance.exists() else None,
    )


def write_adapter(
    adapter: Adapter,
    directory: str | Path,
    *,
    linears: Collection[str] = (),
    beside: Mapping[str, Mapping[str, object]] | None = None,
    replace: bool = False,
) -> None:
    """Write an adapter that PEFT loads, whole or not at all.

    Args:
        adapter: What to write.
        directory: Created; must not exist unless `replace`.
        linears: Paths of all linear layers of the base. With them, `target_modules` is written
            as name endings where these select exactly the adapted layers.
        beside: Further JSON files by name.
        replace: Whether an existing directory may be replaced.

    Raises:
        StorageError: It exists, or writing failed.
    """
    tensors: dict[str, Tensor] = {}
    for path, factors in adapter.modules.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = factors.a_RI.detach().contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = factors.b_OR.detach().contiguous()
    with new_directory(Path(directory), replace=replace) as target:
        write_safetensors(target / WEIGHTS_FILE, tensors, metadata={"format": "pt"})
        _write_json(target / CONFIG_FILE, peft_config(adapter, linears))
        if adapter.provenance is not None:
            _write_json(target / PROVENANCE_FILE, dict(adapter.provenance))
        for name, content in (beside or {}).items():
            _write_json(target / name, content)


def peft_config(adapter: Adapter, linears: Collection[str] = ()) -> dict[str, object]:
    """The content of `adapter_config.json`: PEFT's keys only, since it warns of others."""
    ranks = {path: f.rank for path, f in adapter.modules.items()}
    alphas = {path: f.alpha for path, f in adapter.modules.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": _integral(alpha),
        "lora_dropout": adapter.dropout,
        "target_modules": _target_modules(adapter.modules, linears),
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: _integral(a) for path, a in alphas.items() if a != alpha},
        "use_rslora": any(f.use_rslora for f in adapter.modules.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _refuse_unsupported(config: Mapping[str, object], directory: Path) -> None:
    problems = [
        f"{key}: {config[key]!r}"
        for key, harmless in _ABSENT.items()
        if config.get(key, harmless) not in (harmless, None, False, [], {})
    ]
    if (kind := config.get("peft_type")) != "LORA":
        problems.append(f"peft_type: 'LORA' expected, found {kind!r}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        problems.append(f"init_lora_weights: {init!r} means that its base was changed, too")
    if problems:
        raise UnsupportedError(
            f"{directory / CONFIG_FILE}: only plain LoRA can be applied faithfully",
            problems=problems,
        )


def _modules(
    tensors: Mapping[str, Tensor], config: Mapping[str, object], directory: Path
) -> dict[str, LoraUpdate]:
    factors: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in tensors.items():
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        if suffix is None or not name.startswith(_PREFIX):
            problems.append(f"{name}: {_PREFIX}<module path>.lora_A.weight (or B) expected")
            continue
        path = name.removeprefix(_PREFIX).removesuffix(suffix)
        factors.setdefault(path, {})[_SUFFIXES[suffix]] = tensor.float()
    modules = {}
    for path, pair in factors.items():
        missing = [label for label, key in (("lora_A", "a"), ("lora_B", "b")) if key not in pair]
        if missing:
            problems.append(f"{path}.{missing[0]}: missing")
            continue
        try:
            shape = _configured_shape(path, config, directory)
            modules[path] = LoraUpdate(pair["a"], pair["b"], shape.alpha, shape.use_rslora)
        except FormatError as error:
            problems.append(f"{path}: {error.message}; {'; '.join(error.problems)}".rstrip("; "))
            continue
        if modules[path].rank != shape.rank:
            problems.append(
                f"{path}: rank {shape.rank} in {CONFIG_FILE}, {modules[path].rank} in its factors"
            )
        problems += [
            f"{path}.lora_{key.upper()}: holds NaN or infinite values"
            for key, tensor in pair.items()
            if not tensor.isfinite().all()
        ]
    if not factors:
        problems.append("it holds no factors")
    if problems:
        raise FormatError(f"{directory}: not a LoRA adapter", problems=problems)
    return modules


def _configured_shape(path: str, config: Mapping[str, object], directory: Path) -> LoraShape:
    rank = _pattern_value(path, config, "rank_pattern", "r", directory)
    alpha = _pattern_value(path, config, "alpha_pattern", "lora_alpha", directory)
    if rank < 1 or rank != int(rank):
        raise FormatError(
            f"{directory / CONFIG_FILE}: r: a positive integer expected, found {rank}"
        )
    return LoraShape(int(rank), alpha, bool(config.get("use_rslora", False)))


def _pattern_value(
    path: str, config: Mapping[str, object], patterns_key: str, key: str, directory: Path
) -> float:
    patterns = config.get(patterns_key) or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"{directory / CONFIG_FILE}: {patterns_key}: an object expected")
    for pattern in patterns:
        if _may_be_slow(pattern):
            raise FormatError(
                f"{directory / CONFIG_FILE}: {patterns_key}: {pattern[:80]!r} is too complex"
            )
        if pattern == path or pattern_matches(pattern, path):
            return _number(patterns, pattern, None, directory)
    return _number(config, key, None, directory)


def _may_be_slow(pattern: str) -> bool:
    # A file of a stranger's must not hang us: no repeated groups, few repetitions, short.
    repetitions = sum(pattern.count(c) for c in "*+{")
    return (
        len(pattern) > _MAX_PATTERN
        or repetitions > _MAX_REPETITIONS
        or re.search(r"\)[*+?{]", pattern) is not None
    )


def _number(
    config: Mapping[str, object], key: str, default: float | None, directory: Path
) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FormatError(f"{directory / CONFIG_FILE}: {key}: a number expected, found {value!r}")
    return float(value)


def _target_modules(modules: Mapping[str, LoraUpdate], linears: Collection[str]) -> list[str]:
    endings = sorted({path.rpartition(".")[2] for path in modules})
    selected = {name for name in linears if name.rpartition(".")[2] in endings}
    return endings if selected == set(modules) else sorted(modules)


def _most_common(values: Mapping[str, Number]) -> Number:
    return Counter(values.values()).most_common(1)[0][0]


def _integral(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

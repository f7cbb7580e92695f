"""Reading a config: file, then `key=value`, then flags, with errors that show where to look.

The sources are merged before validation, and each leaf remembers where it came from, so that an
error names the line of the file or the very argument. Keys of other tools are recognised, never
obeyed: the error says what they are called here.
"""

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from halfbyte.errors import ConfigError, MissingFileError
from halfbyte.training.config import Config

KeyPath = tuple[str, ...]

OTHER_NAMES = {
    "base_model": "model",
    "model_name_or_path": "model",
    "datasets": "data.train",
    "dataset": "data.train",
    "train_file": "data.train",
    "validation_file": "data.eval",
    "val_set_size": "data.eval_fraction",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "train_on_inputs": "data.train_on_prompt",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lora_target_modules": "lora.targets",
    "lora_target": "lora.targets",
    "epochs": "training.num_epochs",
    "num_train_epochs": "training.num_epochs",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.scheduler",
    "lr_scheduler_type": "training.scheduler",
    "max_norm": "training.max_grad_norm",
    "micro_batch_size": "training.micro_batch_tokens",
    "per_device_train_batch_size": "training.micro_batch_tokens",
    "gradient_accumulation_steps": "training.tokens_per_step",
    "batch_size": "training.tokens_per_step",
    "optim": "optimizer.name",
    "gradient_checkpointing": "memory.recompute",
    "output_dir": "output.dir",
    "save_total_limit": "training.keep_checkpoints",
    "logging_dir": "output.dir",
}
"""What other trainers call a setting -> what it is called here."""


@dataclass(slots=True)
class _Merged:
    """A tree of settings and the source of each leaf."""

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def put(self, path: KeyPath, value: object, origin: str) -> None:
        tree = self.values
        for key in path[:-1]:
            below = tree.get(key)
            if not isinstance(below, dict):
                below = tree[key] = {}
            tree = below
        tree[path[-1]] = value
        self.origins[path] = origin

    def origin(self, path: KeyPath) -> str:
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path[:-1]
        return ""


def load_config(
    file: str | Path | None = None,
    assignments: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> Config:
    """Merge and validate the sources of a configuration.

    Args:
        file: YAML (JSON is YAML); may be left out.
        assignments: `training.learning_rate=1e-4`; the value is read as YAML.
        flags: Dotted name -> value, what the command line's own options gave; None is absent.

    Raises:
        MissingFileError: `file` does not exist.
        ConfigError: Lists every fault with its file and line or argument.
    """
    merged = _Merged()
    if file is not None:
        for path, value, line in _read_yaml(Path(file)):
            merged.put(path, value, f"{file}:{line}")
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise ConfigError(f"{assignment!r}: key=value expected, such as lora.rank=8")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{assignment!r}: the value is not YAML: {error}") from error
        merged.put(tuple(name.split(".")), _number(value), f"argument {assignment!r}")
    for name, value in (flags or {}).items():
        if value is not None:
            merged.put(tuple(name.split(".")), value, f"option for {name}")
    try:
        return Config.model_validate(merged.values)
    except ValidationError as error:
        problems = [_describe(fault, merged) for fault in error.errors()]
        raise ConfigError("the configuration cannot be used", problems=problems) from None


def write_config(config: Config, path: Path) -> None:
    """Write every setting, defaults included, as YAML."""
    content = config.model_dump(mode="json")
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _read_yaml(file: Path) -> Iterator[tuple[KeyPath, object, int]]:
    if not file.is_file():
        raise MissingFileError(f"{file}: no such config file")
    try:
        node = yaml.compose(file.read_text(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {error}") from error
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{file}:1: a mapping of settings expected")
    yield from _leaves(node, (), file)


def _leaves(
    node: yaml.MappingNode, prefix: KeyPath, file: Path
) -> Iterator[tuple[KeyPath, object, int]]:
    seen: set[str] = set()
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value)
        if key in seen:
            raise ConfigError(f"{file}:{line}: {'.'.join((*prefix, key))} is given twice")
        seen.add(key)
        path = (*prefix, key)
        if isinstance(value_node, yaml.MappingNode) and path in _SECTIONS:
            yield from _leaves(value_node, path, file)
        else:
            yield path, _construct(value_node), line


def _construct(node: yaml.Node) -> object:
    loader = yaml.SafeLoader("")
    try:
        return _number(loader.construct_object(node, deep=True))
    finally:
        loader.dispose()


def _number(value: object) -> object:
    # YAML 1.1 reads 1e-4 as a string: it wants a dot in the mantissa.
    if isinstance(value, str) and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _sections(
    model: type[BaseModel], prefix: KeyPath = ()
) -> Iterator[tuple[KeyPath, type[BaseModel]]]:
    yield prefix, model
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _sections(info.annotation, (*prefix, name))


_SECTIONS = dict(_sections(Config))


def _describe(fault: typing.Any, merged: _Merged) -> str:  # noqa: ANN401  (pydantic's ErrorDetails)
    path = tuple(str(part) for part in fault["loc"])
    name = ".".join(path)
    where = merged.origin(path)
    prefix = f"{where}: " if where else ""
    if fault["type"] == "extra_forbidden":
        return f"{prefix}unknown key {name}{_suggestion(path)}"
    if fault["type"] == "missing":
        return f"{name} is required"
    return f"{prefix}{name}: {fault['msg']}, found {fault['input']!r}"


def _suggestion(path: KeyPath) -> str:
    if path[-1] in OTHER_NAMES:
        return f": here it is called {OTHER_NAMES[path[-1]]}"
    names = {
        ".".join((*section, key))
        for section, model in _SECTIONS.items()
        for key in model.model_fields
    }
    by_key = {name.rpartition(".")[2]: name for name in names}
    close = difflib.get_close_matches(".".join(path), names, n=1, cutoff=0.7)
    close = close or [
        by_key[k] for k in difflib.get_close_matches(path[-1], by_key, n=1, cutoff=0.7)
    ]
    return f": did you mean {close[0]}?" if close else ""

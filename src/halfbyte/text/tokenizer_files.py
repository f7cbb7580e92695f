"""The tokenizer's files of a model directory: read, bounded, and cross-checked.

Files: `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`,
`generation_config.json`, `config.json`, `chat_template.jinja`. Only the first must exist.
Keys that name code to run (`auto_map`) are ignored: nothing here runs what it reads.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import FormatError, MissingFileError
from halfbyte.storage.json_file import read_json_object

MAX_FILE_BYTES = 256 << 20
TOKEN_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")
_LIST_ROLES = ("additional_special_tokens", "extra_special_tokens")
_CONFIGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the files say.

    Attributes:
        tokenizer: The text of `tokenizer.json`.
        roles: `bos_token`, `eos_token`, ... -> the token's name.
        special: Further names that are special tokens.
        adds_bos: Whether text starts with the bos token; None where no file says it.
        eos_ids: End-of-text ids that generation_config and config name, in that order.
        templates: Chat templates by name; the usual one is `default`.
    """

    tokenizer: str
    roles: Mapping[str, str]
    special: tuple[str, ...]
    adds_bos: bool | None
    eos_ids: tuple[int, ...]
    templates: Mapping[str, str]


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read the files of `directory`.

    Raises:
        MissingFileError: There is no `tokenizer.json`.
        FormatError: Files are damaged; all faults are listed.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise MissingFileError(
            f"{directory}: no tokenizer.json",
            hint="Older models hold only a SentencePiece file or vocab.json with merges.txt: load "
            "the tokenizer with `transformers` and save it, which writes tokenizer.json.",
        )
    problems: list[str] = []
    text = _read_text(path, problems)
    configs = {name: _read_object(directory / name, problems) for name in _CONFIGS}
    tokenizer_config = configs["tokenizer_config.json"]
    sources = (configs["special_tokens_map.json"], tokenizer_config)
    roles = dict(_roles(sources, problems))
    files = TokenizerFiles(
        tokenizer=text,
        roles=roles,
        special=tuple(_special(sources, problems)),
        adds_bos=_flag(tokenizer_config, "add_bos_token", problems),
        eos_ids=tuple(_eos_ids(configs, problems)),
        templates=_templates(directory, tokenizer_config, problems),
    )
    if problems:
        raise FormatError(f"{directory}: unusable tokenizer files", problems=problems)
    return files


def _read_text(path: Path, problems: list[str]) -> str:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        problems.append(f"{path.name}: at most {MAX_FILE_BYTES} bytes expected, found {size}")
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        problems.append(f"{path.name}: not UTF-8 at byte {error.start}")
        return ""


def _read_object(path: Path, problems: list[str]) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except FormatError as error:
        problems.append(error.message)
        problems += error.problems
        return {}


def _name(value: object) -> str | None:
    """A token is written as its name, or as an object with its name in `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _roles(
    sources: tuple[Mapping[str, object], ...], problems: list[str]
) -> Iterator[tuple[str, str]]:
    for source in sources:  # the later one wins
        for role in TOKEN_ROLES:
            value = source.get(role)
            if value is None:
                continue
            name = _name(value)
            if name is None:
                problems.append(f"{role}: the name of a token expected, found {value!r:.80}")
            else:
                yield role, name


def _special(sources: tuple[Mapping[str, object], ...], problems: list[str]) -> Iterator[str]:
    for source in sources:
        for role in _LIST_ROLES:
            value = source.get(role) or []
            if isinstance(value, dict):  # a role of the model's own -> a name
                value = list(value.values())
            names = [_name(one) for one in value] if isinstance(value, list) else [None]
            if None in names:
                problems.append(f"{role}: a list of token names expected, found {value!r:.80}")
            yield from (name for name in names if name is not None)


def _flag(config: Mapping[str, object], key: str, problems: list[str]) -> bool | None:
    value = config.get(key)
    if value is None or isinstance(value, bool):
        return value
    problems.append(f"tokenizer_config.json: {key}: true or false expected, found {value!r:.80}")
    return None


def _eos_ids(configs: Mapping[str, Mapping[str, object]], problems: list[str]) -> Iterator[int]:
    for file in ("generation_config.json", "config.json"):
        value = configs[file].get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for one in ids:
            if isinstance(one, int) and not isinstance(one, bool) and one >= 0:
                yield one
            else:
                problems.append(f"{file}: eos_token_id: token ids expected, found {one!r:.80}")


def _templates(
    directory: Path, config: Mapping[str, object], problems: list[str]
) -> dict[str, str]:
    """Templates in files of their own take precedence over those in the config."""
    templates: dict[str, str] = {}
    value = config.get("chat_template")
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        for entry in value:
            name, source = (
                (entry.get("name"), entry.get("template"))
                if isinstance(entry, dict)
                else (None, None)
            )
            if isinstance(name, str) and isinstance(source, str):
                templates[name] = source
            else:
                problems.append(
                    "tokenizer_config.json: chat_template: a list of objects with `name` and "
                    f"`template` expected, found {entry!r:.80}"
                )
    elif value is not None:
        problems.append(f"tokenizer_config.json: chat_template: text expected, found {value!r:.80}")
    file = directory / "chat_template.jinja"
    if file.is_file():
        templates["default"] = _read_text(file, problems)
    return templates

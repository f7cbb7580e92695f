"""Models of the Hugging Face hub: fetched only when a hub id was given, weights as data only."""

import re
from pathlib import Path

from halfbyte.errors import MissingFileError, StorageError

PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE*",
    "NOTICE",
)
"""What is downloaded: no pickles, no code."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a hub id: `org/model`."""
    return _ID.fullmatch(text) is not None and not text.endswith((".gguf", ".bin", ".safetensors"))


def download(model_id: str) -> tuple[Path, str]:
    """The directory of a model in the hub's cache, and its revision.

    Files that are in the cache are not fetched again, and `HF_HUB_OFFLINE=1` forbids the network.

    Raises:
        MissingFileError: There is no such model, or it cannot be seen without a login; or offline,
            and it is not in the cache.
        StorageError: The network or the disk failed.
    """
    # The network is nobody's business until a model is asked for.
    from huggingface_hub import constants, snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        path = snapshot_download(model_id, allow_patterns=list(PATTERNS))
    except GatedRepoError as error:
        raise MissingFileError(
            f"{model_id}: its owners ask for an agreement first",
            hint=f"Agree on https://huggingface.co/{model_id}, then `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise MissingFileError(
            f"{model_id}: no such path here, and no such model on the hub",
            hint="Private models need `hf auth login`.",
        ) from error
    except LocalEntryNotFoundError as error:
        reason = "the hub is switched off (HF_HUB_OFFLINE)"
        if not constants.HF_HUB_OFFLINE:
            reason = "the hub cannot be reached"
        raise MissingFileError(
            f"{model_id}: no such path here, not in the hub's cache, and {reason}",
            hint="Name a directory or GGUF file, or fetch the model where there is a network.",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise StorageError(f"{model_id}: download failed: {error!s:.300}") from error
    return Path(path), Path(path).name

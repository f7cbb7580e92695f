"""Special tokens, and what keeps user text from spelling them.

A special token is matched by its name wherever the name stands, so a user who types
`<|im_end|>` could end a turn. The remedy: a copy of the tokenizer in which every special
token bears a secret name that nobody can type, with the same id. Text encoded by the copy
holds no special token, except where a secret name was put in on purpose.
"""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer as Backend

# A noncharacter-like private code point on both sides, and 64 random bits between them.
_FENCE = "\U0010fffd"


def secret_name() -> str:
    """A string that no text holds."""
    return f"{_FENCE}{secrets.token_hex(8)}{_FENCE}"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Names of the special tokens of one tokenizer.

    Attributes:
        ids: Name -> id.
        pattern: Matches every name, the longest one first.
    """

    ids: Mapping[str, int]
    pattern: re.Pattern[str] = field(init=False)
    _hidden: Mapping[str, str] = field(init=False)  # name -> what stands for it in user text
    _secret: Mapping[str, str] = field(init=False)  # name -> its name in the copy

    def __post_init__(self) -> None:
        longest_first = sorted(self.ids, key=lambda name: (-len(name), name))
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        object.__setattr__(self, "pattern", re.compile(pattern))
        object.__setattr__(self, "_hidden", {name: secret_name() for name in self.ids})
        object.__setattr__(self, "_secret", {name: secret_name() for name in self.ids})

    def spelled_in(self, text: str) -> list[str]:
        """The special tokens whose names stand in `text`, in order."""
        return self.pattern.findall(text)

    def hide(self, text: str) -> str:
        """`text` with every name replaced by a stand-in, so that a template cannot read it."""
        return self.pattern.sub(lambda match: self._hidden[match[0]], text)

    def show(self, text: str) -> str:
        """`text` with every stand-in replaced by the name."""
        return _substitute(text, {hidden: name for name, hidden in self._hidden.items()})

    def as_secret(self, text: str) -> str:
        """Names become secret names, and stand-ins become names: the input of the copy."""
        return self.show(self.pattern.sub(lambda match: self._secret[match[0]], text))

    def rename(self, backend: Backend) -> Backend:
        """The copy: `backend` with every special token under its secret name.

        The names also leave the model's own vocabulary, where a unigram model or one that
        looks whole words up could find them.
        """
        description = json.loads(backend.to_str())
        for token in description["added_tokens"]:
            token["content"] = self._secret.get(token["content"], token["content"])
        model = description["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {self._secret.get(k, k): v for k, v in vocabulary.items()}
        else:
            model["vocab"] = [[self._secret.get(k, k), score] for k, score in vocabulary]
        if model.get("unk_token") in self._secret:
            model["unk_token"] = self._secret[model["unk_token"]]
        return Backend.from_str(json.dumps(description))


def _substitute(text: str, replacements: Mapping[str, str]) -> str:
    if _FENCE not in text or not replacements:
        return text
    pattern = "|".join(map(re.escape, replacements))
    return re.sub(pattern, lambda match: replacements[match[0]], text)

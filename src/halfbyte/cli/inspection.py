"""What `inspect` found: a few facts in plain words, and the same for machines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from halfbyte.cli.output import JsonValue, Output
from halfbyte.formats.stored_tensors import StoredTensor


@dataclass(frozen=True, slots=True)
class Inspection:
    """An artifact, explained.

    Attributes:
        path: What was looked at.
        kind: `model`, `adapter`, `stack`, `checkpoint`, `run`, `safetensors` or `gguf`.
        title: The kind in words: `a model in 4 bits`.
        facts: What is asked -> what was found, in order; `unknown` where nothing says.
        doubts: What does not agree, is missing, or was not checked; a sentence each.
        record: The facts for machines.
        tensors: What it holds, 4-bit weights as one tensor each.
    """

    path: Path
    kind: str
    title: str
    facts: Mapping[str, str]
    doubts: Sequence[str] = ()
    record: Mapping[str, JsonValue] = field(default_factory=dict)
    tensors: Sequence[StoredTensor] = ()

    def show(self, output: Output, *, tensors: bool) -> None:
        """Print it, with the table of tensors on request."""
        output.heading(f"{self.path}: {self.title}")
        width = max(map(len, self.facts), default=0)
        for name, fact in self.facts.items():
            output.text(f"  {name:<{width}}  {fact}")
        for doubt in self.doubts:
            output.text(f"  ! {doubt}")
        if tensors:
            rows = [
                (t.name, t.stored, " x ".join(map(str, t.shape)) or "scalar", f"{t.nbytes:,}")
                for t in self.tensors
            ]
            output.text()
            output.table(("tensor", "stored as", "shape", "bytes"), rows)

    def to_json(self, *, tensors: bool) -> dict[str, JsonValue]:
        """Everything, with the tensors on request."""
        record: dict[str, JsonValue] = {
            "path": str(self.path),
            "kind": self.kind,
            "title": self.title,
            "facts": self.facts,
            "doubts": self.doubts,
            **self.record,
        }
        if tensors:
            record["tensors"] = [tensor.to_json() for tensor in self.tensors]
        return record

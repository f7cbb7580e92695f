"""What a run resolves once and keeps: choices that affect rounding, and so the exact result."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.errors import FormatError
from halfbyte.storage.atomic import write_file
from halfbyte.storage.json_file import read_json_object

CHOICES_FILE = "choices.json"


@dataclass(frozen=True, slots=True)
class Choices:
    """Fixed before the first step and taken up again by every resume.

    Attributes:
        micro_batch_tokens: Most tokens that go through the model at once.
        recompute: Layers that compute their activations again in the backward pass.
        num_threads: Of PyTorch: sums are cut into as many parts.
        kernels: Instruction set of the kernels; another machine may round otherwise.
    """

    micro_batch_tokens: int
    recompute: int
    num_threads: int
    kernels: str

    def write(self, run_directory: Path) -> None:
        """Write `choices.json`."""
        content = json.dumps(asdict(self), indent=2) + "\n"
        write_file(run_directory / CHOICES_FILE, content.encode())

    @staticmethod
    def read(run_directory: Path) -> "Choices | None":
        """The choices of a run; None when it had not come to make them.

        Raises:
            FormatError: The file does not hold them.
        """
        path = run_directory / CHOICES_FILE
        if not path.exists():
            return None
        content = read_json_object(path)
        try:
            choices = Choices(**content)  # type: ignore[arg-type]
        except TypeError as error:
            raise FormatError(f"{path}: {error}") from error
        for name, value in asdict(choices).items():
            expected = str if name == "kernels" else int
            if type(value) is not expected:
                raise FormatError(f"{path}: {name}: {expected.__name__} expected, found {value!r}")
        return choices

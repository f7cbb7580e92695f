"""Every error a user can meet, in one tree.

Each class also inherits the builtin that fits, so `except ValueError` keeps working, and
carries the exit code of the command line. A message says what was expected, what was found
and where; `problems` lists all faults at once, and `hint` says what to do next.
"""

from collections.abc import Sequence


class HalfbyteError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        code: Short stable name for machines, printed by `--json`.
        exit_code: What the command line returns.
        problems: One line a fault, in the order in which they were found.
        num_problems: How many there are; more than are listed when a long list was cut.
        hint: What to do next; empty when the message says it.
    """

    code = "failure"
    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        problems: Sequence[str] = (),
        num_problems: int | None = None,
        hint: str = "",
    ) -> None:
        self.message = message
        self.problems = tuple(problems)
        self.num_problems = len(self.problems) if num_problems is None else num_problems
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        lines = [self.message]
        if self.problems:
            count = self.num_problems
            lines[0] += f": {count} problem{'s' if count > 1 else ''}"
        lines += [f"  {problem}" for problem in self.problems]
        if unlisted := self.num_problems - len(self.problems):
            lines.append(f"  and {unlisted} more")
        if self.hint:
            lines.append(self.hint)
        return "\n".join(lines)


class UsageError(HalfbyteError, ValueError):
    """A command or function was called in a way that cannot work."""

    code = "usage"
    exit_code = 2


class ConfigError(UsageError):
    """A config file, a `key=value` or a flag is wrong."""

    code = "config"


class FormatError(HalfbyteError, ValueError):
    """Bytes or tensors are not what their format says."""

    code = "format"


class DataError(HalfbyteError, ValueError):
    """Rows to train on are missing, malformed, or cannot be used as asked."""

    code = "data"


class MissingFileError(HalfbyteError, FileNotFoundError):
    """A file or directory that was named does not exist."""

    code = "missing-file"


class UnsupportedError(HalfbyteError, NotImplementedError):
    """A valid input that this version has no support for."""

    code = "unsupported"


class MissingPackageError(HalfbyteError, ImportError):
    """An optional package is needed for this input and is not installed."""

    code = "missing-package"


class BackendError(HalfbyteError, RuntimeError):
    """A kernel backend is present but broken, or was demanded and is absent."""

    code = "backend"


class StorageError(HalfbyteError, OSError):
    """Reading or writing failed: disk full, not permitted, or in use by another process."""

    code = "storage"


class VerificationError(HalfbyteError, ValueError):
    """A measured check failed: a hash, a fingerprint, a certificate."""

    code = "verification"
    exit_code = 3


class DoesNotFitError(HalfbyteError, MemoryError):
    """The work needs more memory or disk than there is."""

    code = "does-not-fit"
    exit_code = 4


class UnsafeArtifactError(HalfbyteError, ValueError):
    """A file asks for something that reading it must never do."""

    code = "unsafe"
    exit_code = 5


class TrainingError(HalfbyteError, ArithmeticError):
    """A step of training gave no finite result."""

    code = "not-finite"

"""A model's chat template, rendered in a process of its own under limits.

Why a process: see `template_worker`. It starts with the first rendering (60 ms), stays for
the next ones (about 50 microseconds each), and ends with this one. A template that exceeds
its limits is killed and refused from then on.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from halfbyte.errors import (
    BackendError,
    FormatError,
    HalfbyteError,
    UnsafeArtifactError,
    UsageError,
)
from halfbyte.text import template_worker

MAX_TEMPLATE_CHARACTERS = 256 << 10
MAX_REPLY_BYTES = 512 << 20
# The worker's own limit is CPU time; this one ends a wait on a machine that is too busy.
WALL_SECONDS = 60.0
_CHUNK = 1 << 20
_GRACE_SECONDS = 0.2

Message = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Rendering:
    """One thing to render: messages, and whether the answer's opening follows them."""

    messages: Sequence[Message]
    add_generation_prompt: bool


class ChatTemplate:
    """A jinja2 chat template and the special tokens it may name.

    Args:
        source: The template.
        variables: What the template sees beside the messages: `bos_token` and so on.
        origin: Where the template came from, for messages.

    Raises:
        UnsafeArtifactError: The template is larger than any real one.
    """

    def __init__(self, source: str, variables: Mapping[str, object], origin: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise UnsafeArtifactError(
                f"chat template of {origin}: at most {MAX_TEMPLATE_CHARACTERS} characters "
                f"expected, found {len(source)}"
            )
        self.source = source
        self.origin = origin
        self._variables = dict(variables)
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._refusal: UnsafeArtifactError | None = None
        self._lock = threading.Lock()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as one text.

        Raises:
            UnsafeArtifactError: The template exceeded its limits.
            UsageError: The template refuses these messages.
            FormatError: The template is broken.
        """
        (result,) = self.try_render([Rendering(messages, add_generation_prompt)])
        if isinstance(result, HalfbyteError):
            raise result
        return result

    def try_render(self, renderings: Sequence[Rendering]) -> list[str | HalfbyteError]:
        """Render several at once; a rendering that fails gives its error instead of a text.

        Raises:
            UnsafeArtifactError: The template exceeded its limits.
            FormatError: The template is broken.
        """
        request = [
            {
                "messages": list(one.messages),
                "add_generation_prompt": one.add_generation_prompt,
            }
            for one in renderings
        ]
        with self._lock:
            if self._refusal is not None:
                raise self._refusal
            answer = self._ask(self._started(), request)
        return [one["text"] if "text" in one else self._error(one) for one in answer]

    def _started(self) -> "subprocess.Popen[bytes]":
        # A forked child must not talk through its parent's pipes.
        if self._worker is not None and self._owner == os.getpid():
            return self._worker
        paths = {str(Path(str(m.__file__)).parent.parent) for m in (jinja2, markupsafe)}
        worker = subprocess.Popen(  # noqa: S603  (our own file, no shell)
            [sys.executable, "-I", "-S", template_worker.__file__, *sorted(paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in ("TZ",) if name in os.environ},
        )
        self._worker, self._owner = worker, os.getpid()
        weakref.finalize(self, _end, worker, self._owner)
        answer = self._ask(worker, {"template": self.source, "variables": self._variables})
        if answer:
            self._stop()
            raise self._error(answer)
        return worker

    def _ask(self, worker: "subprocess.Popen[bytes]", request: object) -> Any:  # noqa: ANN401
        assert worker.stdin is not None  # noqa: S101  (both are pipes)
        assert worker.stdout is not None  # noqa: S101
        try:
            worker.stdin.write(json.dumps(request).encode() + b"\n")
            worker.stdin.flush()
            return json.loads(_line(worker.stdout.fileno()))
        except (BrokenPipeError, EOFError, TimeoutError) as error:
            status = self._stop()
            if 0 <= status != template_worker.EXIT_OUT_OF_MEMORY:
                raise BackendError(
                    f"the process for chat templates could not run: exit status {status}",
                    hint=f"Try it by hand: {sys.executable} -I {template_worker.__file__}",
                ) from error
            self._refusal = UnsafeArtifactError(
                f"chat template of {self.origin}: it did not finish within "
                f"{template_worker.CPU_SECONDS:g} s of CPU time and "
                f"{template_worker.MAX_MEMORY >> 20} MiB, and was stopped",
                hint="Real templates need microseconds. Use the template of a source you trust.",
            )
            raise self._refusal from error

    def _stop(self) -> int:
        """End the worker; its exit status, negative for a signal."""
        worker, self._worker = self._worker, None
        assert worker is not None  # noqa: S101  (only called after it started)
        _end(worker, self._owner)
        return worker.returncode

    def _error(self, answer: Mapping[str, str]) -> HalfbyteError:
        where, message = f"chat template of {self.origin}", answer["message"]
        match answer["error"]:
            case "limit":
                return UnsafeArtifactError(f"{where}: it exceeds a limit: {message}")
            case "unsafe":
                return UnsafeArtifactError(f"{where}: it asks for what is forbidden: {message}")
            case "refused":
                return UsageError(f"{where} does not accept these messages: {message}")
            case _:
                return FormatError(f"{where} cannot be rendered: {message}")


def _line(descriptor: int) -> bytes:
    """What the worker answers up to the end of the line, within time and size."""
    deadline = time.monotonic() + WALL_SECONDS
    answer = bytearray()
    while not answer.endswith(b"\n"):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready or len(answer) > MAX_REPLY_BYTES:
            raise TimeoutError
        chunk = os.read(descriptor, _CHUNK)
        if not chunk:
            raise EOFError
        answer += chunk
    return bytes(answer)


def _end(worker: "subprocess.Popen[bytes]", owner: int) -> None:
    if owner != os.getpid():
        return
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    try:
        worker.wait(timeout=_GRACE_SECONDS)  # it ends by itself when its input does
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()

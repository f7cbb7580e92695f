"""Ending a text at a stop string that may arrive in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on until a stop string begins.

    Text that could be the beginning of a stop string is held back until it is clear.

    Attributes:
        found: Whether a stop string came; nothing passes after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The part of all text so far that is new and certain."""
        if self.found:
            return ""
        self._held += text
        begins = [i for stop in self._stops if (i := self._held.find(stop)) >= 0]
        if begins:
            self.found = True
            passed, self._held = self._held[: min(begins)], ""
            return passed
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

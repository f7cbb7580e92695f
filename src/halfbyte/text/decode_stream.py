"""Ids to text one by one, in pieces that join exactly to the text of all of them."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"


class DecodeStream:
    """Holds back ids until their text can no longer change.

    Two things keep text open: bytes of an unfinished character, and byte tokens of
    SentencePiece models, which are decoded as a run (one wrong byte makes the whole run
    unreadable), so a run is held until another token ends it. Ids are decoded together with
    the previous piece, because a decoder may treat the start of its input differently (it
    drops a leading space there).

    Args:
        decode: Ids to text, without skipping.
        is_byte: Whether an id is a byte token of a SentencePiece model.
        skipped: Ids that have no text.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_byte: Callable[[int], bool],
        skipped: frozenset[int],
    ) -> None:
        self._decode = decode
        self._is_byte = is_byte
        self._skipped = skipped
        self._context: list[int] = []  # ids of the previous piece
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Add one id; the text that became final, often empty for part of a character."""
        if token in self._skipped:
            return ""
        self._pending.append(token)
        if self._is_byte(token):
            return ""
        text = self._text()
        return "" if text.endswith(_REPLACEMENT) else self._take(text)

    def finish(self) -> str:
        """The rest, where bytes without a character show as U+FFFD. Starts afresh."""
        text = self._text() if self._pending else ""
        self._context, self._pending = [], []
        return text

    def _text(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._pending)[len(before) :]

    def _take(self, text: str) -> str:
        if text:  # ids without text stay, as the context of the next piece
            self._context, self._pending = self._pending, []
        return text

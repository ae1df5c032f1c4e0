"""Incremental decoding of token ids to text: whole characters only, cut at stop strings."""

import codecs
from collections.abc import Sequence

from llmctl.tokenizer.base import Tokenizer


class TextStream:
    """Decodes tokens incrementally: no partial characters, and stop strings are cut off even across tokens.

    `text` is everything returned so far. Without a tokenizer there is no text. `begins`: drop the space that a tokenizer
    prepends to the first word of a text.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], *, begins: bool = False) -> None:
        self.tokenizer, self.stop, self.begins = tokenizer, [text for text in stop if text], begins
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.held = "", ""
        self.is_stopped = False

    def feed(self, token: int) -> str:
        """Add a token and return the text that can no longer become part of a stop string."""
        if self.tokenizer is None or self.is_stopped:
            return ""
        data = self.tokenizer.decode_bytes([token])
        if self.begins and data:
            self.begins = False
            data = data.removeprefix(b"" if self.tokenizer.decode([token]).startswith(" ") else b" ")
        return self._give(self.held + self.decoder.decode(data))

    def close(self) -> str:
        """Return the text held back; an incomplete character becomes U+FFFD."""
        if self.is_stopped:
            return ""
        rest = self._give(self.held + self.decoder.decode(b"", final=True))
        tail, self.held = self.held, ""  # empty if a stop string was just found
        self.text += tail
        return rest + tail

    def _give(self, pending: str) -> str:
        starts = [start for start in (pending.find(stop) for stop in self.stop) if start >= 0]
        if starts:
            self.is_stopped, self.held = True, ""
            new = pending[: min(starts)]
        else:  # hold back what may be the start of a stop string
            n_held = max((overlap(pending, stop) for stop in self.stop), default=0)
            new, self.held = pending[: len(pending) - n_held], pending[len(pending) - n_held :]
        self.text += new
        return new


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)

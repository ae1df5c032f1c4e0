"""Incremental decoding of token ids to text: whole characters only, cut at stop strings."""

import codecs
from collections.abc import Sequence

from llmctl.tokenizer.base import Tokenizer

CONTEXT_TOKENS = 8
"""Ids before a continuation that are decoded with it."""


class TextStream:
    """Decodes tokens incrementally: no partial characters, and stop strings are cut off even across tokens.

    `text` is everything returned so far. Without a tokenizer there is no text. `begins`: drop the space that a tokenizer
    prepends to the first word of a text. `context`: the ids before, by which some decoders choose spaces.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, stop: Sequence[str], *, begins: bool = False, context: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.stop, self.begins = tokenizer, [text for text in stop if text], begins
        self.ids = [] if begins else list(context[-CONTEXT_TOKENS:])
        self.start, self.end = 0, len(self.ids)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.held = "", ""
        self.is_stopped = False

    def feed(self, token: int) -> str:
        """Add a token and return the text that can no longer become part of a stop string."""
        if self.tokenizer is None or self.is_stopped:
            return ""
        if not self.tokenizer.joins_bytes:
            self.ids.append(token)
            return self._give(self.held + self._decoded(self.tokenizer, is_last=False))
        data = self.tokenizer.decode_bytes([token])
        if self.begins and data:
            self.begins = False
            data = data.removeprefix(b"" if self.tokenizer.decode([token]).startswith(" ") else b" ")
        return self._give(self.held + self.decoder.decode(data))

    def close(self) -> str:
        """Return the text held back; an incomplete character becomes U+FFFD."""
        if self.is_stopped:
            return ""
        end = self.decoder.decode(b"", final=True)
        if self.tokenizer is not None and not self.tokenizer.joins_bytes:
            end = self._decoded(self.tokenizer, is_last=True)
        rest = self._give(self.held + end)
        tail, self.held = self.held, ""  # empty if a stop string was just found
        self.text += tail
        return rest + tail

    def _decoded(self, tokenizer: Tokenizer, *, is_last: bool) -> str:
        """Return the text of the ids since the last call, whose spaces depend on the ids before them."""
        known = tokenizer.decode(self.ids[self.start : self.end])
        text = tokenizer.decode(self.ids[self.start :])
        if not is_last and (len(text) <= len(known) or text.endswith("\ufffd")):
            return ""  # an incomplete character, or a token without text
        self.start, self.end = self.end, len(self.ids)
        return text[len(known) :]

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

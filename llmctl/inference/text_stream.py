"""Text from token ids as they come, never half a character, cut at stop strings."""

import codecs
from collections.abc import Sequence

from llmctl.tokenizer.base import Tokenizer


class TextStream:
    """Turns tokens into text as they come: no broken characters, stop strings cut off even across tokens.

    `text` is everything given out so far. Without a tokenizer there is no text. With `begins`, the space that a
    tokenizer itself puts before the first word of a text is left out again.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], *, begins: bool = False) -> None:
        self.tokenizer, self.stop, self.begins = tokenizer, [text for text in stop if text], begins
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.held = "", ""
        self.is_stopped = False

    def feed(self, token: int) -> str:
        """Take a token and return the text that is certain to stay."""
        if self.tokenizer is None or self.is_stopped:
            return ""
        data = self.tokenizer.decode_bytes([token])
        if self.begins and data:
            self.begins = False
            data = data.removeprefix(b"" if self.tokenizer.decode([token]).startswith(" ") else b" ")
        return self._give(self.held + self.decoder.decode(data))

    def close(self) -> str:
        """Return what was held back; an incomplete character becomes U+FFFD."""
        if self.is_stopped:
            return ""
        rest = self._give(self.held + self.decoder.decode(b"", final=True))
        tail, self.held = self.held, ""  # nothing is held once a stop string was found
        self.text += tail
        return rest + tail

    def _give(self, pending: str) -> str:
        places = [place for place in (pending.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.is_stopped, self.held = True, ""
            new = pending[: min(places)]
        else:
            n_held = max((overlap(pending, stop) for stop in self.stop), default=0)
            new, self.held = pending[: len(pending) - n_held], pending[len(pending) - n_held :]
        self.text += new
        return new


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` could be the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)

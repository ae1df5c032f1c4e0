r"""What reaches a terminal: no control characters, whatever a file, a path or a model puts into a text.

Escape sequences move the cursor, retitle the window, or type into the shell; bidirectional overrides show another text
than the one that is there (CVE-2021-42574). They are shown as `\u001b`, which is also valid inside JSON.
"""

import re
from collections.abc import Iterable
from typing import Any, TextIO

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""C0 except tab and newline, DEL, C1, and the bidirectional embeddings, overrides and isolates."""


def plain(text: str) -> str:
    """Return a text with its control characters spelled out; tabs and newlines stay."""
    return CONTROLS.sub(spelled, text)


def on_one_line(text: str) -> str:
    """Return a text with all control characters spelled out, newlines and tabs too: a cell of a table."""
    return plain(text).replace("\n", r"\n").replace("\t", r"\t")


def spelled(match: re.Match[str]) -> str:
    """Return a character as JSON escapes it."""
    return f"\\u{ord(match[0]):04x}"


class WrappedStream:
    """A text stream around another; what a subclass does not change is the other's own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        return self.stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the stream."""
        return getattr(self.stream, name)


class GuardedStream(WrappedStream):
    """A text stream that spells out control characters; everything else is the stream's own.

    A carriage return at the start of a write stays: progress bars of other libraries redraw their line with it.
    """

    def write(self, text: str) -> int:
        """Write a text."""
        head = "\r" if text.startswith("\r") else ""
        return self.stream.write(head + plain(text.removeprefix("\r")))


def guarded(stream: Any, *, always: bool) -> Any:
    """Return the stream, guarded if it is a terminal; `always`: messages are guarded in a log, too.

    Results in a pipe or a file stay exact.
    """
    return GuardedStream(stream) if stream is not None and (always or stream.isatty()) else stream

"""Progress is never fatal: a reader of stderr that goes away (`2>&1 | head`) does not end a run."""

import os
from collections.abc import Iterable
from typing import Any, TextIO


class Unbreakable:
    """A text stream that writes to nowhere once its reader is gone; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.let_go()
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.let_go()

    def let_go(self) -> None:
        """Point the descriptor to nowhere: what is still buffered, libraries and child processes write there too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the stream."""
        return getattr(self.stream, name)

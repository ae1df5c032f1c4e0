"""Progress is never fatal: a reader of stderr that goes away (`2>&1 | head`) does not end a run."""

import io
import os
from typing import Any

from llmctl.errors import UsageError
from llmctl.runs.terminal import WrappedStream


class Unbreakable(WrappedStream):
    """A text stream that writes to nowhere once its reader is gone; everything else is the stream's own."""

    def write(self, text: str) -> int:
        """Write a text."""
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.let_go()
            return len(text)

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


class Closed(io.TextIOBase):
    """A standard input that is closed: reading from it is an error that says so."""

    def isatty(self) -> bool:
        """Return true: as at a terminal, nobody has redirected anything to it."""
        return True

    def readable(self) -> bool:
        """Return false."""
        return False

    def __getattribute__(self, name: str) -> Any:
        """Return an attribute, unless it reads.

        Raises: UsageError.
        """
        if name in ("read", "readline", "readlines", "buffer", "__next__", "__iter__", "fileno"):
            raise UsageError("`-` cannot be read: standard input is closed", "redirect a file or a pipe to it")
        return super().__getattribute__(name)

    def __iter__(self) -> Any:
        """Raise the same error: special methods are looked up past `__getattribute__`."""
        return self.readline()

"""Signals, noted for the loop to act on between two steps: save and end, or save and go on."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a run after the step at hand."""


@dataclass
class Caught:
    """The first ending signal that came, 0 if none, and whether SIGUSR1 asked for a checkpoint."""

    number: int = 0
    wants_save: bool = False


class SecondSignalError(KeyboardInterrupt):
    """A second signal while the first is being obeyed: ends at once, with the exit code 128 + number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def watch_signals() -> Iterator[Caught]:
    """Note signals for the loop; a second ending one ends at once.

    A signal that was ignored when the process began (a job in the background, `nohup`) stays ignored. Workers that
    are forked later inherit the handlers, but only the process that set them acts.
    """
    caught, owner = Caught(), os.getpid()

    def note(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:
            return
        if number == signal.SIGUSR1:
            caught.wants_save = True
            return
        if caught.number:
            raise SecondSignalError(number)
        caught.number = number
        sys.stderr.write("\nfinishing this step and saving; once more stops at once\n")

    watched = [number for number in (*ENDING, signal.SIGUSR1) if signal.getsignal(number) != signal.SIG_IGN]
    old = {number: signal.signal(number, note) for number in watched}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

"""Signals, noted for the loop to act on between two steps: save and end, or save and go on."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from llmctl.distributed.ranks import LAUNCHED

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a run after the step at hand."""

ECHO_SECONDS = 2.0
"""Time in which a second signal is the first one again: `systemctl stop` and Slurm signal every process of a job, the
launcher as well as those it passes the signal on to."""


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
    echoes_until = 0.0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal echoes_until
        if os.getpid() != owner:
            return
        if number == signal.SIGUSR1:
            caught.wants_save = True
            return
        if caught.number:
            if time.monotonic() < echoes_until:
                return
            raise SecondSignalError(number)
        caught.number = number
        echoes_until = time.monotonic() + (ECHO_SECONDS if LAUNCHED in os.environ else 0.0)
        sys.stderr.write("\nfinishing this step and saving; press Ctrl-C again to stop at once\n")

    watched = [number for number in (*ENDING, signal.SIGUSR1) if signal.getsignal(number) != signal.SIG_IGN]
    old = {number: signal.signal(number, note) for number in watched}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

"""Signals, recorded for the loop to act on between two steps: save and stop, or save and continue."""

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
"""Signals that end a run after the current step."""

ECHO_SECONDS = 2.0
"""Interval in which further signals count as the first: `systemctl stop` and Slurm signal every process of a job, and the
launcher forwards its signal too. One later signal counts as the first as well: a busy launcher forwards it late."""


@dataclass
class Caught:
    """The first stop signal (0 if none), and whether SIGUSR1 requested a checkpoint."""

    number: int = 0
    wants_save: bool = False


class SecondSignalError(KeyboardInterrupt):
    """A second signal while the first is handled: exits at once with code 128 + number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def watch_signals() -> Iterator[Caught]:
    """Record signals for the loop; a second stop signal exits at once.

    Signals ignored at startup (background jobs, `nohup`) stay ignored. Forked workers inherit the handlers, but only the
    process that set them acts.
    """
    caught, owner = Caught(), os.getpid()
    echoes_until, has_echo = 0.0, LAUNCHED in os.environ

    def note(number: int, _: FrameType | None) -> None:
        nonlocal echoes_until, has_echo
        if os.getpid() != owner:
            return
        if number == signal.SIGUSR1:
            caught.wants_save = True
            return
        if caught.number:
            is_echo, has_echo = has_echo or time.monotonic() < echoes_until, False
            if is_echo:
                return
            raise SecondSignalError(number)
        caught.number = number
        echoes_until = time.monotonic() + (ECHO_SECONDS if has_echo else 0.0)
        text = "\nfinishing this step and saving; press Ctrl-C again to stop at once\n"
        try:
            sys.stderr.write(text)
        except RuntimeError:  # the run was just writing a line there, and its buffer cannot be entered twice
            os.write(sys.stderr.fileno(), text.encode())

    watched = [number for number in (*ENDING, signal.SIGUSR1) if signal.getsignal(number) != signal.SIG_IGN]
    old = {number: signal.signal(number, note) for number in watched}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

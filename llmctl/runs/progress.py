"""What a person sees while something trains: a live line on a terminal, plain lines elsewhere, nothing when quiet.

Everything goes to stderr. Knows numbers and strings only.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from llmctl.runs.loss_curve import sparkline

Say = Callable[[str], None]
"""Writes one line of progress."""

SAY_SECONDS = 3.0
"""How long something takes at least before, and between, lines on how far it has come."""


class Progress(Protocol):
    """Where the loop sends what happens."""

    def step(self, record: Mapping[str, Any], total_steps: int, eta_seconds: float) -> None:
        """Show one step: its record has step, loss, lr, tokens_per_second, memory_bytes."""

    def say(self, text: str) -> None:
        """Show one line that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def make_progress(*, quiet: bool, verbose: bool = False) -> Progress:
    """Return the progress display that fits stderr; `verbose` is a line per step, wherever it goes."""
    if quiet:
        return Silent()
    if verbose:
        return Plain(every_step=True)
    return Live() if sys.stderr.isatty() else Plain()


class Silent:
    """Shows nothing."""

    def step(self, record: Mapping[str, Any], total_steps: int, eta_seconds: float) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing."""


class Plain:
    """One line every ten seconds or every fiftieth of the steps, whichever is rarer: fit for logs."""

    def __init__(self, *, every_step: bool = False) -> None:
        self.every_step = every_step
        self.last_time = 0.0
        self.last_step = 0
        self.started = False

    def step(self, record: Mapping[str, Any], total_steps: int, eta_seconds: float) -> None:
        """Write a line if enough has happened since the last one."""
        step, now = int(record["step"]), time.monotonic()
        is_due = now - self.last_time >= 10 and step - self.last_step >= total_steps / 50
        if self.every_step or is_due or not self.started or step == total_steps:
            self.started, self.last_time, self.last_step = True, now, step
            self.say(describe(record, total_steps, eta_seconds))

    def say(self, text: str) -> None:
        """Write the line."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Do nothing."""


class Live:
    """One line that rich keeps up to date, at most four times a second, with the course of the loss."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive
        from rich.text import Text

        self.text = Text
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.live = RichLive(console=self.console, refresh_per_second=4, transient=True)
        self.losses: list[float] = []
        self.ascii_only = not (self.console.encoding or "").lower().startswith("utf")
        self.shown_at = 0.0
        self.live.start()

    def step(self, record: Mapping[str, Any], total_steps: int, eta_seconds: float) -> None:
        """Redraw the line."""
        self.losses.append(float(record["loss"]))
        now = time.monotonic()
        if now - self.shown_at < 0.25:
            return
        self.shown_at = now
        width = max(10, min(30, self.console.width - 90))
        bars = sparkline(self.losses, width, ascii_only=self.ascii_only)
        text = f"{describe(record, total_steps, eta_seconds)}  {bars}"
        self.live.update(self.text(text, no_wrap=True, overflow="ellipsis"))

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        self.console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Take the live line away."""
        self.live.stop()


def describe(record: Mapping[str, Any], total_steps: int, eta_seconds: float) -> str:
    """Return a step as one line."""
    utilization = f"  {record['utilization']:.0%} util" if record.get("utilization") else ""
    return (
        f"step {record['step']}/{total_steps}  loss {record['loss']:.3f}  lr {record['lr']:.1e}  "
        f"{record['tokens_per_second']:,.0f} tok/s{utilization}  {record['memory_bytes'] / 2**20:,.0f} MB  "
        f"eta {clock(eta_seconds)}"
    )


def paced(say: Callable[[str], None], what: str, n_all: int) -> Callable[[int], None]:
    """Return what takes the number of parts that are done, and says it with the time that is left; not too often."""
    begun = said = time.monotonic()

    def done(n_done: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SAY_SECONDS:
            said = now
            say(f"{what} {n_done} of {n_all}, eta {clock((now - begun) / n_done * (n_all - n_done))}")

    return done


def clock(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    whole = max(0, int(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

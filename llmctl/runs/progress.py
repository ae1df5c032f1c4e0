"""Progress display on stderr: a live line on a terminal, plain lines elsewhere, nothing with --quiet.

Formats numbers and strings; knows nothing about training.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from llmctl.metrics.figures import shown
from llmctl.runs.loss_curve import sparkline
from llmctl.runs.terminal import plain

Say = Callable[[str], None]
"""A function that prints one line of progress."""

NO_TOTAL_STEPS = 10**9
"""The total while a budget in minutes has not yet been converted to steps."""

SAY_SECONDS = 3.0
"""The minimum interval between two lines of `paced`, and before the first."""


class Progress(Protocol):
    """The display that the training loop reports to."""

    def step(self, record: Mapping[str, Any], total_steps: int, eta_seconds: float) -> None:
        """Show one step; its record has step, loss, lr, tokens_per_second, memory_bytes."""

    def say(self, text: str) -> None:
        """Show a permanent line."""

    def close(self) -> None:
        """Restore the terminal."""


def make_progress(*, quiet: bool, verbose: bool = False) -> Progress:
    """Choose the display for stderr; `verbose` prints one line per step, even on a terminal."""
    if quiet:
        return Silent()
    if verbose:
        return Plain(every_step=True)
    return Live() if sys.stderr.isatty() else Plain()


class Silent:
    """The display of --quiet."""

    def step(self, record: Mapping[str, Any], total_steps: int, eta_seconds: float) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing."""


class Plain:
    """For logs: one line every 10 seconds or every 2 % of the steps, whichever is less often."""

    def __init__(self, *, every_step: bool = False) -> None:
        self.every_step = every_step
        self.last_time = 0.0
        self.last_step = 0
        self.started = False

    def step(self, record: Mapping[str, Any], total_steps: int, eta_seconds: float) -> None:
        """Print a line if one is due; the first and the last step always print."""
        step, now = int(record["step"]), time.monotonic()
        # Both conditions: at most one line per 10 seconds, and at most about 50 in total.
        is_due = now - self.last_time >= 10 and step - self.last_step >= total_steps / 50
        if self.every_step or is_due or not self.started or step == total_steps:
            self.started, self.last_time, self.last_step = True, now, step
            self.say(describe(record, total_steps, eta_seconds))

    def say(self, text: str) -> None:
        """Print the line."""
        sys.stderr.write(plain(text) + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Do nothing."""


class Live:
    """For terminals: one line with a loss sparkline, redrawn by rich at most four times a second."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive
        from rich.text import Text

        self.text = Text
        # rich draws with escape sequences of its own, past the guard of stderr.
        stream = getattr(sys.stderr, "stream", sys.stderr)
        self.console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self.live = RichLive(console=self.console, refresh_per_second=4, transient=True)
        self.losses: list[float] = []
        self.ascii_only = not (self.console.encoding or "").lower().startswith("utf")
        self.shown_at = 0.0
        self.live.start()

    def step(self, record: Mapping[str, Any], total_steps: int, eta_seconds: float) -> None:
        """Redraw the line if 0.25 seconds have passed."""
        self.losses.append(float(record["loss"]))
        now = time.monotonic()
        if now - self.shown_at < 0.25:
            return
        self.shown_at = now
        # The numbers take about 90 columns.
        width = max(10, min(30, self.console.width - 90))
        bars = sparkline(self.losses, width, ascii_only=self.ascii_only)
        text = f"{describe(record, total_steps, eta_seconds)}  {bars}"
        self.live.update(self.text(text, no_wrap=True, overflow="ellipsis"))

    def say(self, text: str) -> None:
        """Print a permanent line above the live one."""
        self.console.print(plain(text), soft_wrap=True)

    def close(self) -> None:
        """Erase the live line."""
        self.live.stop()


def describe(record: Mapping[str, Any], total_steps: int, eta_seconds: float) -> str:
    """Format a step's record as one line."""
    utilization = f"  {record['utilization']:.0%} util" if record.get("utilization") else ""
    is_known = total_steps < NO_TOTAL_STEPS
    return (
        # The eta early: a narrow terminal cuts the end off.
        f"step {record['step']}/{total_steps if is_known else '?'}  loss {shown(record['loss'], '.3f')}  "
        f"eta {clock(eta_seconds) if is_known else '?'}  lr {record['lr']:.1e}  "
        f"{record['tokens_per_second']:,.0f} tok/s{utilization}  {record['memory_bytes'] / 2**20:,.0f} MB"
    )


def paced(say: Callable[[str], None], what: str, n_all: int) -> Callable[[int], None]:
    """Return a callback that takes the number of finished parts and prints progress with the time left.

    It prints at most every `SAY_SECONDS`.
    """
    started = last_printed = time.monotonic()

    def done(n_done: int) -> None:
        nonlocal last_printed
        now = time.monotonic()
        if now - last_printed >= SAY_SECONDS:
            last_printed = now
            say(f"{what} {n_done} of {n_all}, eta {clock((now - started) / n_done * (n_all - n_done))}")

    return done


def clock(seconds: float) -> str:
    """Format seconds as m:ss or h:mm:ss."""
    whole = max(0, int(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

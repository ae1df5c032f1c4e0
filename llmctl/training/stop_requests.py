"""What makes a run save or stop between two steps besides its plan: signals, the time limit, the save interval."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from llmctl.config import TrainConfig
from llmctl.distributed.runtime import Runtime
from llmctl.errors import InterruptedRunError, StoppedError
from llmctl.losses.base import IGNORE
from llmctl.training.batch import Batch, positions
from llmctl.training.saving import Saver
from llmctl.training.step_sync import Word
from llmctl.training.stop_signals import Caught

LIMIT_RESERVE_SECONDS = 5.0
"""Time between the end of a run and its time limit, besides what saving takes."""


class StopEvaluationError(Exception):
    """A signal came during an evaluation, which is repeated when the run resumes."""


class StopRequests:
    """The requests to save or stop that reach this process, and what is done about them in all processes.

    limit: when this process must have ended, on the clock of `time.monotonic`.
    """

    def __init__(self, saver: Saver, config: TrainConfig, runtime: Runtime, limit: float | None) -> None:
        self.saver, self.config, self.runtime, self.limit = saver, config, runtime, limit
        self.state, self.hint = saver.state, f"resume with: {saver.resume_command}"
        self.caught = Caught()
        self.longest: dict[str, float] = {}
        self.saves_when_stopped = True

    def word(self, batches: Sequence[Batch]) -> Word:
        """Return what this process contributes before a step."""
        number, wants_save = self.caught.number, self.caught.wants_save
        self.caught.wants_save = False
        is_main, now, minutes = self.runtime.is_main, time.monotonic(), self.config.save_minutes
        return Word(
            labels=sum(int((batch["labels"] != IGNORE).sum()) for batch in batches),
            positions=sum(map(positions, batches)),
            sigint=number == signal.SIGINT,
            sigterm=number == signal.SIGTERM,
            sighup=number == signal.SIGHUP,
            wants_save=wants_save or (is_main and minutes > 0 and now - self.saver.saved_at >= 60 * minutes),
            at_limit=is_main and self.limit is not None and now + self.reserve() >= self.limit,
            total_steps=self.state.total_steps if is_main else 0,
        )

    def reserve(self) -> float:
        """Return the seconds to keep before the limit: twice the longest step, evaluation and save so far, and a few more."""
        return 2 * (sum(self.longest.values()) + self.saver.longest_seconds) + LIMIT_RESERVE_SECONDS

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Remember how long something takes at most."""
        begun = time.monotonic()
        yield
        self.longest[what] = max(self.longest.get(what, 0.0), time.monotonic() - begun)

    def obey(self, agreed: Word) -> None:
        """Stop or save if a signal, the limit or the clock asks for it.

        Raises: InterruptedRunError, StoppedError.
        """
        if agreed.number:
            self.stop(agreed.number)
        if agreed.at_limit:
            self.saver.save(is_needed=True)
            raise StoppedError(
                f"stopped at the time limit, at step {self.state.step} of {self.state.total_steps}, checkpoint saved",
                self.hint,
            )
        if agreed.wants_save:
            self.saver.save()

    def give_way(self) -> None:
        """Let a signal end a long evaluation, in all processes at once.

        Raises: StopEvaluationError.
        """
        number = torch.tensor(float(self.caught.number), device=self.runtime.device)
        if float(self.runtime.sum(number)):
            raise StopEvaluationError

    def stop(self, number: int) -> None:
        """Save and stop after a signal.

        Raises: InterruptedRunError.
        """
        # A signal during an evaluation may have reached another process only.
        number = max(self.runtime.gather(number))
        name = signal.Signals(number).name
        if not self.state.before:
            raise InterruptedRunError(f"stopped by {name} before the first step", self.hint, number)
        if self.saves_when_stopped:
            self.saver.save(is_needed=True)
        raise InterruptedRunError(
            f"stopped by {name} at step {self.state.step} of {self.state.total_steps}, checkpoint saved",
            self.hint,
            number,
        )

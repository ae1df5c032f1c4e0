"""From a budget to a number of steps; when to evaluate and save."""

import time

from llmctl.config import TrainConfig
from llmctl.runs.progress import NO_TOTAL_STEPS
from llmctl.training.state import State


def planned_steps(config: TrainConfig, n_rows: int) -> int:
    """Return the steps of a budget in steps, tokens or epochs of `n_rows`; NO_TOTAL_STEPS for minutes alone."""
    by_tokens = -(-config.tokens // (config.batch_size * config.seq_len)) if config.tokens else 0
    by_epochs = max(1, -(-int(config.epochs * n_rows) // config.batch_size)) if config.epochs else 0
    return config.steps or by_tokens or by_epochs or NO_TOTAL_STEPS


class Planner:
    """Turns a budget into a number of steps, which the learning-rate schedule depends on.

    Steps, tokens and epochs determine it at once. A budget in minutes is divided by the measured step time: first at step 4,
    then at doubling intervals until half the time is used; after that the number only decreases.
    """

    RESERVE_FRAC = 0.06
    """Fraction of the budget reserved for the final evaluation and writing the model."""

    def __init__(self, config: TrainConfig, deadline: float | None, n_rows: int = 0) -> None:
        self.config, self.deadline, self.n_rows = config, deadline, n_rows
        self.next_revision = 4
        self.begun: tuple[int, float] = (0, 0.0)

    def begin(self, state: State) -> None:
        """Set the number of steps, unless a checkpoint has set it."""
        self.begun = (state.step, time.monotonic())
        self.next_revision = max(4, state.step + 4)
        if state.total_steps:
            return
        state.total_steps = planned_steps(self.config, self.n_rows)

    def revise(self, state: State) -> None:
        """Recompute the number of steps from the remaining time and the measured step time."""
        if self.deadline is None or state.step < self.next_revision:
            return
        now = time.monotonic()
        n_steps, seconds = state.step - self.begun[0], now - self.begun[1]
        left = (self.deadline - now) - self.RESERVE_FRAC * self.config.minutes * 60
        planned = state.step + max(0, int(left / (seconds / n_steps)))
        is_early = seconds < left
        if is_early or planned < state.total_steps or state.total_steps == NO_TOTAL_STEPS:
            limit = planned_steps(self.config, self.n_rows)
            state.total_steps = max(state.step, min(planned, limit))
        self.next_revision = state.step * 2 if is_early else state.step + max(1, state.step // 20)

    def is_check_due(self, state: State) -> bool:
        """Return whether this step has to be evaluated and has not been yet."""
        if state.step in (0, state.checked_step):
            return False
        every = self.config.eval_every or max(1, -(-state.total_steps // 10))
        return state.step >= state.total_steps or state.step % every == 0

    def is_save_due(self, state: State) -> bool:
        """Return whether a checkpoint is due at this step besides those of evaluations."""
        return bool(self.config.save_every) and state.step % self.config.save_every == 0

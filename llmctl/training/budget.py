"""From a budget to a number of steps; when to evaluate, on how many rows, and when to save.

Steps, tokens and epochs say it at once. Minutes are divided by what was measured: a few held-out rows are timed before the
first step, which gives a first guess, and every step after it.
"""

import time

from llmctl.config import TrainConfig
from llmctl.runs.progress import NO_TOTAL_STEPS
from llmctl.training.state import State


def planned_steps(config: TrainConfig, n_rows: int) -> int:
    """Return the steps of a budget in steps, tokens or epochs of `n_rows`; NO_TOTAL_STEPS for minutes alone."""
    by_tokens = -(-config.tokens // (config.batch_size * config.seq_len)) if config.tokens else 0
    by_epochs = max(1, -(-int(config.epochs * n_rows) // config.batch_size)) if config.epochs else 0
    return config.steps or by_tokens or by_epochs or NO_TOTAL_STEPS


FEW_STEPS = 20
"""A budget of minutes that holds fewer steps is said to be short."""


class Planner:
    """Turns a budget into a number of steps, which the learning-rate schedule depends on.

    A budget in minutes is divided by the measured step time: by a guess before the first step, from the time of an evaluation,
    then at doubling steps until half the time is used, then every twentieth. From then on the number grows only if more than
    a tenth of the budget would remain.
    """

    EVAL_FRAC = 0.15
    """Fraction of a budget of minutes for all evaluations, with their samples and checkpoints."""

    ENDS_FRAC = 0.05
    """Fraction for each of the evaluations before and after training."""

    RESERVE_FRAC = 0.03
    """Fraction reserved for writing the model and leaving; at least `RESERVE_SECONDS`."""

    RESERVE_SECONDS = 1.0

    STEP_PER_FORWARD = 4.0
    """A step's time as a multiple of that of a forward pass without gradients, before a step was measured."""

    def __init__(self, config: TrainConfig, deadline: float | None, n_rows: int = 0) -> None:
        self.config, self.deadline, self.n_rows = config, deadline, n_rows
        self.budget = config.minutes * 60
        self.next_revision, self.started = 2, time.monotonic()
        self.total_steps = 0
        self.every = 0
        self.row_seconds = 0.0
        self.full_seconds = self.check_seconds = self.spent = 0.0
        self.step_seconds: list[float] = []

    @property
    def is_timed(self) -> bool:
        """Whether the budget is one of minutes, alone or as a limit."""
        return self.deadline is not None and self.budget > 0

    def fitting_rows(self, n_held_out: int) -> int:
        """Return on how many held-out rows the evaluations before and after training fit into their share."""
        if not self.row_seconds:
            return n_held_out
        return min(n_held_out, max(1, int(self.ENDS_FRAC * self.budget / self.row_seconds)))

    def note_full(self, seconds: float, n_full: int, n_check: int) -> None:
        """Note how long the evaluation before training took, and on how many rows it and the later ones are."""
        self.full_seconds, self.spent = seconds, self.spent + seconds
        self.check_seconds = seconds * min(1.0, n_check / max(1, n_full))

    def note_check(self, seconds: float) -> None:
        """Note how long an evaluation with its samples and its checkpoint took."""
        self.check_seconds, self.spent = seconds, self.spent + seconds

    def note_step(self, seconds: float) -> None:
        """Note how long a step took."""
        self.step_seconds.append(seconds)
        if len(self.step_seconds) > 4096:
            del self.step_seconds[1:2048]

    def begin(self, state: State) -> None:
        """Set the number of steps, unless a checkpoint has set it."""
        self.started = time.monotonic()
        # A resumed run keeps its plan until its steps have been measured again.
        self.next_revision = state.step + (4 if state.total_steps else 1)
        if not state.total_steps:
            guess = self.row_seconds * self.STEP_PER_FORWARD * self.config.batch_size
            limit = planned_steps(self.config, self.n_rows)
            state.total_steps = limit
            if self.is_timed and guess:
                fitting = self.fitting_steps(state, guess)
                # A guess must not end a run that has time: after one step it is known better.
                state.total_steps = min(limit, fitting if self.is_late() else max(fitting, state.step + 4))
        self.total_steps = state.total_steps
        self.every = self.interval(state)

    def is_late(self) -> bool:
        """Return whether the time is used up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def fitting_steps(self, state: State, step_seconds: float) -> int:
        """Return the step at which the time is used up; the first one is always taken."""
        assert self.deadline is not None
        # What was slow at the start will be slow at the end.
        waited = self.started - (self.deadline - self.budget)
        reserve = max(self.RESERVE_FRAC * self.budget, self.RESERVE_SECONDS, min(3.0, 0.15 * waited))
        # At the end: the last evaluation, which is that after training too if both are on all rows.
        reserve += max(self.full_seconds, self.check_seconds)
        left = self.deadline - time.monotonic() - reserve
        if self.every and self.total_steps < NO_TOTAL_STEPS:
            left -= self.check_seconds * max(0, (self.total_steps - state.checked_step) // self.every - 1)
        return max(1, state.step + int(left / step_seconds)) if left > 0 else max(1, state.step)

    def interval(self, state: State) -> int:
        """Return the steps between two evaluations: a tenth of all, or more if evaluations would take too much of the time."""
        tenth = max(1, -(-self.total_steps // 10))
        if self.config.eval_every or not self.is_timed:
            return self.config.eval_every or tenth
        left = self.EVAL_FRAC * self.budget - self.spent - max(self.full_seconds, self.check_seconds)
        n_more = int(max(0.0, left) / self.check_seconds) if self.check_seconds else 9
        return max(tenth, -(-(self.total_steps - state.checked_step) // (n_more + 1)))

    def few_steps(self, state: State) -> str:
        """Return a line that says that a budget of minutes was too short to learn from, empty if it was not."""
        if self.deadline is None or state.step >= FEW_STEPS or state.step < self.total_steps:
            return ""
        known = self.step_seconds[1:] or self.step_seconds
        each = sum(known) / max(1, len(known))
        waited = self.started - (self.deadline - self.budget)
        steps = f"{state.step} step{'s' * (state.step > 1)}"
        return (
            f"only {steps} fit into {self.config.minutes:g} minutes ({waited:.0f} s before the first, {each:.2g} s each): "
            "the model has hardly learned\nhint: more --minutes; or a smaller --batch-size or model"
        )

    def revise(self, state: State) -> None:
        """Recompute the number of steps from the remaining time and the measured step time."""
        if self.deadline is None or state.step < self.next_revision or state.step >= state.total_steps:
            return  # the last step is already being evaluated as such
        # The first step also fills caches. Of the others the newer half: other processes come and go.
        known = self.step_seconds[1:] or self.step_seconds
        newer = known[len(known) // 2 :]
        step_seconds = sum(newer) / len(newer)
        self.total_steps = state.total_steps
        planned = min(self.fitting_steps(state, step_seconds), planned_steps(self.config, self.n_rows))
        left = self.deadline - time.monotonic()
        is_early = left > self.budget / 2
        idle = (planned - state.total_steps) * step_seconds
        if is_early or planned < state.total_steps or state.total_steps == NO_TOTAL_STEPS or idle > self.budget / 10:
            self.total_steps = max(state.step, planned)
        self.every = self.interval(state)
        self.next_revision = state.step * 2 if is_early else state.step + max(1, state.step // 20)

    def is_check_due(self, state: State, every: int) -> bool:
        """Return whether this step has to be evaluated and has not been yet; `every`: the interval that all have agreed on."""
        if state.step in (0, state.checked_step):
            return False
        if state.step >= state.total_steps:
            return True
        if self.is_timed and not self.config.eval_every:
            # The interval changes with the plan, so it is counted from the last evaluation; none is due right before the last.
            return state.step - state.checked_step >= every and state.total_steps - state.step > every // 2
        return state.step % (self.config.eval_every or max(1, -(-state.total_steps // 10))) == 0

    def is_save_due(self, state: State) -> bool:
        """Return whether a checkpoint is due at this step besides those of evaluations."""
        return bool(self.config.save_every) and state.step % self.config.save_every == 0

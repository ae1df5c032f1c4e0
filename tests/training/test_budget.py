"""A budget in minutes is divided by what was measured: steps, learning rate, evaluations."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmctl.config import TrainConfig
from llmctl.runs import checkpoint
from llmctl.runs.metrics_file import MetricsFile
from llmctl.runs.progress import NO_TOTAL_STEPS
from llmctl.training.budget import FEW_STEPS, Planner
from llmctl.training.inputs import Training
from llmctl.training.loop import fit
from llmctl.training.optim import schedule
from llmctl.training.state import State
from tests.training.test_loop import training


def planner(minutes: float = 1.0, *, left: float | None = None, **train: Any) -> Planner:
    config = TrainConfig(**({"steps": 0, "minutes": minutes} | train))
    return Planner(config, time.monotonic() + (60 * minutes if left is None else left))


def test_the_steps_are_guessed_before_the_first_one_is_taken():
    plan, state = planner(), State()
    plan.row_seconds = 0.01
    plan.begin(state)
    each = 0.01 * Planner.STEP_PER_FORWARD * plan.config.batch_size
    assert state.total_steps == pytest.approx(60 * (1 - Planner.RESERVE_FRAC) / each, rel=0.02)
    assert schedule(0, state.total_steps, training_rates()) == 1 / max(1, round(0.02 * state.total_steps))


def training_rates() -> Any:
    from llmctl.config import OptimConfig

    return OptimConfig()


def test_the_time_left_is_divided_by_the_measured_step_and_the_first_does_not_count():
    plan, state = planner(), State()
    plan.row_seconds = 0.1
    plan.begin(state)
    for seconds in (30.0, 0.5, 0.5, 0.5):
        plan.note_step(seconds)
    state.step = 4
    plan.revise(state)
    assert plan.total_steps == pytest.approx(4 + 60 * (1 - Planner.RESERVE_FRAC) / 0.5, rel=0.02)


def test_the_plan_shrinks_when_the_machine_becomes_slower_and_grows_only_if_much_would_remain():
    for seconds, expected in ((1.0, 110), (0.4, 120), (0.1, 300)):
        plan, state = planner(left=10.0 + 3), State(step=100, total_steps=120)
        plan.begin(state)
        state.step = 104
        plan.step_seconds = [seconds] * 5
        plan.revise(state)
        assert plan.total_steps == pytest.approx(max(104 + 10 / seconds, 0) if expected != 120 else 120, abs=2)


def test_a_slow_first_evaluation_does_not_end_a_run_that_has_time():
    plan, state = planner(), State()
    plan.row_seconds = 5.0
    plan.begin(state)
    assert state.total_steps == 4
    plan.note_step(0.5)
    state.step = 1
    plan.revise(state)
    assert plan.total_steps > 50


def test_a_plan_that_is_reached_does_not_grow():
    """The last step is evaluated as such; one more would be evaluated again."""
    plan, state = planner(), State(step=8, total_steps=8)
    plan.next_revision, plan.step_seconds = 4, [0.1] * 8
    plan.begin(state)
    plan.next_revision = 4
    plan.revise(state)
    assert plan.total_steps == 8


def test_a_spent_budget_still_takes_one_step():
    plan, state = planner(left=-5.0), State()
    plan.row_seconds = 0.01
    plan.begin(state)
    assert state.total_steps == 1


@pytest.mark.parametrize("seconds", [0.001, 0.1, 1.0, 5.0, 100.0])
def test_evaluations_take_at_most_their_share(seconds: float):
    """For evaluations that take `seconds` on all rows, their number times their time is within the share."""
    plan, state = planner(minutes=1.0), State()
    plan.row_seconds = seconds / 100
    n_rows = plan.fitting_rows(100)
    full = n_rows * plan.row_seconds
    assert full <= max(Planner.ENDS_FRAC * 60, plan.row_seconds)
    plan.note_full(full, n_rows, n_rows)
    plan.begin(state)
    state.total_steps = plan.total_steps = 1000
    every, n_checks = plan.interval(state), 0
    for step in range(1, 1001):
        state.step = step
        if plan.is_check_due(state, every):
            n_checks, state.checked_step = n_checks + 1, step
    assert n_checks >= 1, "the last step is always evaluated"
    assert (1 + n_checks) * full <= max(Planner.EVAL_FRAC * 60, 2 * full)
    assert n_checks <= 11


def test_a_budget_of_steps_is_evaluated_as_ever():
    plan, state = Planner(TrainConfig(steps=95), None), State()
    plan.begin(state)
    due = [step for step in range(96) if plan.is_check_due(State(step=step, total_steps=95), 1)]
    assert due == [10, 20, 30, 40, 50, 60, 70, 80, 90, 95]


class Counted:
    """Held-out rows that count how often they are read."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.n_rows, self.n_read = batches, batches.n_rows, 0

    def batch(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        self.n_read += len(numbers)
        batch: dict[str, np.ndarray] = self.batches.batch(numbers)
        return batch


def counted(folder: Path, **settings: Any) -> tuple[Training, Counted]:
    job = training(folder, **settings)
    held_out = Counted(job.held_out)
    job.held_out = held_out
    return job, held_out


def test_the_last_evaluation_is_not_made_twice(tmp_path):
    job, held_out = counted(tmp_path, steps=8, eval_every=4)
    fitted = fit(job)
    assert held_out.n_read == 3 * held_out.n_rows, "before, at step 4, at step 8"
    lines = [line for line in MetricsFile(tmp_path / "metrics.jsonl").read() if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == [0, 4, 8, 8]
    assert lines[-1]["loss"] == lines[-2]["loss"] == pytest.approx(fitted.after["loss"], abs=1e-5)


def test_an_evaluation_of_a_part_is_not_taken_for_one_of_all_rows(tmp_path):
    job, held_out = counted(tmp_path, steps=8, eval_every=8, eval_tokens=32)
    fit(job)
    assert held_out.n_read == 2 * held_out.n_rows + 2


def test_a_short_budget_of_minutes_learns_from_the_first_step_on(tmp_path):
    job = training(tmp_path, steps=0, minutes=0.05, eval_every=0)
    job.deadline = time.monotonic() + 3
    fitted = fit(job)
    first = next(line for line in MetricsFile(tmp_path / "metrics.jsonl").read() if line["kind"] == "train")
    assert first["lr"] >= job.optim.lr / 50
    assert FEW_STEPS < fitted.state.step < NO_TOTAL_STEPS
    assert fitted.after["loss"] < fitted.before["loss"] - 0.3


def test_rows_are_left_out_if_all_of_them_take_too_long_and_a_resumed_run_takes_the_same(tmp_path):
    said: list[str] = []
    job, held_out = counted(tmp_path, steps=8, minutes=1.0)
    job.deadline = time.monotonic() + 60
    job.progress.say = said.append  # type: ignore[method-assign]
    job.state.eval_rows = 2
    job.state.total_steps = 8  # planned already
    fit(job)
    assert held_out.n_read == 2 * 3
    state = checkpoint.Store(tmp_path / "checkpoints").load_newest()[0].state
    assert state["eval_rows"] == 2
    lines = [line for line in MetricsFile(tmp_path / "metrics.jsonl").read() if line.get("full")]
    assert [line["rows"] for line in lines] == [2, 2]


def test_a_budget_for_a_few_steps_is_said_to_be_short(tmp_path):
    said: list[str] = []
    job = training(tmp_path, steps=0, minutes=0.05, eval_every=0)
    job.deadline = time.monotonic() - 1
    job.progress.say = said.append  # type: ignore[method-assign]
    fitted = fit(job)
    assert fitted.state.step == 1
    assert any("only 1 step fit into 0.05 minutes" in line and "more --minutes" in line for line in said)
    said.clear()
    (tmp_path / "steps").mkdir()
    job = training(tmp_path / "steps", steps=2)
    job.progress.say = said.append  # type: ignore[method-assign]
    fit(job)
    assert not any("fit into" in line for line in said)

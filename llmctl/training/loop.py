"""fit(): the one training loop.

It sums losses over micro-batches and processes, divides once by the global number of labels, clips, steps, logs,
evaluates and saves. The learning rate, the data and the random numbers of a step are functions of (seed, step), so a
resumed run equals an uninterrupted one. It knows nothing of corpora, teachers or quantizers.

Five decisions, marked in the code: [1] all processes agree before a step; [2] when a step is evaluated, saved or the last;
[3] non-finite gradients and spikes (step.py); [4] which step is the best (saving.py); [5] whose weights are kept at the end.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.config import OptimConfig, TrainConfig
from llmctl.distributed.runtime import Runtime
from llmctl.distributed.sharding import whole_tensor
from llmctl.errors import UsageError
from llmctl.machine import peak_memory_bytes
from llmctl.metrics.figures import FIGURES, brief, is_higher_better
from llmctl.model.transformer import LanguageModel
from llmctl.runs import checkpoint
from llmctl.runs.journal import Journal, Tracker
from llmctl.runs.progress import Progress
from llmctl.training import optim
from llmctl.training.batch import Batch, BatchSource
from llmctl.training.budget import Planner
from llmctl.training.held_out import EVAL_ROWS, measure
from llmctl.training.master_weights import Masters, wants_masters
from llmctl.training.objectives import Objective
from llmctl.training.saving import Saver, own_tensors
from llmctl.training.state import State
from llmctl.training.step import Stepper
from llmctl.training.step_sync import Word, agree
from llmctl.training.stop_requests import StopEvaluationError, StopRequests
from llmctl.training.stop_signals import watch_signals


@dataclass
class Training:
    """Everything `fit` works with.

    deadline, limit: on the clock of `time.monotonic`: the end of a budget of minutes; when this process must have ended.
    sample, score: generate samples, and metrics that need generated text, at every evaluation.
    keeps_start: the weights from before the first step are kept if training made them worse.
    """

    objective: Objective
    model: LanguageModel
    train: BatchSource
    held_out: BatchSource
    config: TrainConfig
    optim: OptimConfig
    runtime: Runtime
    folder: Path
    progress: Progress
    resume_command: str
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    deadline: float | None = None
    limit: float | None = None
    sample: Callable[[], list[dict[str, str]]] | None = None
    score: Callable[[int | None], dict[str, float]] | None = None
    metric: str = "loss"
    keeps_start: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)
    trackers: Mapping[str, Tracker] = field(default_factory=dict)
    state: State = field(default_factory=State)


@dataclass(frozen=True)
class Fitted:
    """The result: metrics before and after, the final state, the step whose weights were kept, and these weights."""

    before: dict[str, float]
    after: dict[str, float]
    state: State
    kept_step: int
    weights: dict[str, Tensor]


def fit(training: Training, restored: checkpoint.Checkpoint | None = None) -> Fitted:
    """Train until the budget is used up, and leave the best weights in the model.

    Raises: InterruptedRunError after a signal (saved), StoppedError at a limit (saved), DivergedError after too many
    non-finite steps in a row.
    """
    for stack in training.model.stacks():
        stack.recompute = training.runtime.parallel.activation_checkpointing
    module = training.runtime.prepare(training.objective)
    if training.config.compile:
        module = torch.compile(module)  # type: ignore[assignment]
    masters = None
    if wants_masters(training.runtime, is_on=training.config.master_weights):
        masters = Masters(training.model)
    loop = _Loop(training, module, masters)
    if restored is not None and (changed := loop.saver.restore(restored)):
        training.progress.say(f"the resumed run is not the same bit for bit: {', '.join(changed)}")
    state = training.state
    # Without a checkpoint the run starts over: what it logged before is removed.
    loop.journal.cut_after(*(state.step, state.checked_step) if state.before else (-1, -1))
    with watch_signals() as caught, loop.stepper.loader:
        loop.requests.caught = caught
        try:
            return loop.run()
        finally:
            loop.journal.close()


class _Loop:
    """The state of one call of `fit`."""

    def __init__(self, training: Training, module: nn.Module, masters: Masters | None) -> None:
        self.t, self.module, self.masters = training, module, masters
        self.config, self.runtime, self.state = training.config, training.runtime, training.state
        holder = masters.master if masters else training.model
        self.journal = Journal(training.folder, training.progress, training.trackers, is_open=self.runtime.is_main)
        self.stepper = Stepper(
            module,
            holder,
            masters,
            training.train,
            self.state,
            self.config,
            training.optim,
            self.runtime,
            self.journal,
        )
        self.saver = Saver(
            checkpoint.Store(training.folder / "checkpoints", self.runtime),
            holder,
            masters,
            self.stepper.optimizers,
            self.state,
            self.config,
            self.runtime,
            self.journal,
            training.recipe,
            training.resume_command,
            keeps_start=training.keeps_start,
        )
        self.requests = StopRequests(self.saver, self.config, self.runtime, training.limit)
        self.planner = Planner(self.config, training.deadline, training.train.n_rows)
        self.last_check: tuple[int, dict[str, float]] = (-1, {})

    def run(self) -> Fitted:
        """Take all steps, then evaluate on all held-out rows."""
        state = self.state
        try:
            if self.planner.is_timed and not state.total_steps:
                self.time_evaluation()
            if not state.before:
                self.evaluate_before()
            else:
                self.check_metric()  # a resumed run may have changed it
            self.planner.begin(state)
            every = self.runtime.lead(lambda: self.planner.every)
            if state.step == 0 and (self.config.on_divergence == "rollback" or self.t.keeps_start):
                self.saver.save()
            while True:
                # [2] An evaluation saves too; patience makes the step that was just evaluated the last one.
                if self.planner.is_check_due(state, every):
                    with self.requests.timing("check"):
                        self.check()
                elif self.planner.is_save_due(state):
                    self.saver.save_if_good()
                if 0 < self.config.patience <= state.checks_since_best and state.step == state.checked_step:
                    state.total_steps = self.planner.total_steps = state.step
                loading_seconds, batches = self.stepper.load_batches()
                # [1] What depends on a clock or a signal is known to one process only: their words are summed, so that
                # all take the same step, or none does.
                agreed = agree(self.runtime, self.word(batches))
                state.total_steps, every = int(agreed.total_steps), int(agreed.check_every)
                if state.step >= state.total_steps:
                    if not self.planner.is_check_due(state, every):
                        break
                    continue  # the plan has just become shorter: this was the last step
                self.requests.obey(agreed)
                begun = time.monotonic()
                with self.requests.timing("step"):
                    self.train_step(batches, agreed, loading_seconds)
                state.seconds = self.journal.seconds
                self.planner.note_step(time.monotonic() - begun + loading_seconds)
                if self.runtime.is_main:
                    self.planner.revise(state)
            return self.finish()
        except StopEvaluationError:
            self.requests.stop(self.requests.caught.number)
            raise

    def word(self, batches: list[Batch]) -> Word:
        """Return what this process contributes before a step; the first one's plan holds for all."""
        word = self.requests.word(batches)
        if not self.runtime.is_main:
            return word
        return replace(word, total_steps=self.planner.total_steps, check_every=self.planner.every)

    # --- a step -----------------------------------------------------------------------------------------------------------

    def train_step(self, batches: list[Batch], agreed: Word, loading_seconds: float) -> None:
        """Take one optimizer step, and log it."""
        state = self.state
        begun = time.perf_counter()
        lr_frac = optim.schedule(state.step, state.total_steps, self.t.optim) * state.lr_scale
        optim.set_rates(self.stepper.optimizers, self.t.optim, lr_frac)
        self.t.objective.progress = state.step / max(1, state.total_steps)
        loss = self.stepper.accumulate(batches, max(1, int(agreed.labels)))
        norm = self.stepper.clip(self.t.optim.clip_norm)
        self.stepper.apply(loss, norm)
        state.step += 1
        state.labels += int(agreed.labels)
        state.tokens += int(agreed.positions)
        seconds = time.perf_counter() - begun + loading_seconds
        record = {
            "step": state.step,
            "loss": loss,
            "lr": self.t.optim.lr * lr_frac,
            "grad_norm": norm,
            "tokens": state.tokens,
            "tokens_per_second": agreed.positions / seconds,
            "memory_bytes": peak_memory_bytes(self.runtime.device),
            "loader_share": loading_seconds / seconds,
            "utilization": self.utilization(agreed.positions / seconds),
        }
        if state.step % self.config.log_every == 0 or state.step in (1, state.total_steps):
            self.journal.log("train", record)
        recent = [*self.planner.step_seconds[-32:], seconds]
        left = (state.total_steps - state.step) * sum(recent) / len(recent)
        self.t.progress.step(record, state.total_steps, left)
        if state.bad_steps >= self.config.max_bad_steps:
            self.saver.roll_back()

    def utilization(self, tokens_per_second: float) -> float | None:
        """Return the share of the measured matmul rate that the model's own FLOPs use."""
        if not self.t.peak_flops:
            return None
        return tokens_per_second * self.t.flops_per_token / self.t.peak_flops / self.runtime.world_size

    # --- evaluation ---------------------------------------------------------------------------------------------------------

    def evaluate(self, max_tokens: int | None) -> dict[str, float]:
        """Return metrics on held-out rows: all of them, or evenly spaced ones of `max_tokens`.

        Raises: StopEvaluationError in all processes if one got a signal.
        """
        metrics = measure(
            self.module,
            self.t.objective,
            self.t.held_out,
            self.config,
            self.runtime,
            max_tokens,
            self.requests.give_way,
            sharded=self.stepper.is_fsdp,
        )
        if self.t.score is not None and not self.stepper.is_fsdp:  # a sharded model cannot generate
            metrics |= self.t.score(max_tokens)
        return metrics

    def time_evaluation(self) -> None:
        """Measure what a held-out row costs, on a few of them, and choose how many to evaluate before and after training."""
        n_all = self.t.held_out.n_rows
        n_rows = min(n_all, EVAL_ROWS * self.runtime.world_size)
        seconds = math.inf
        while True:  # the first time is slower, unless the model is so large that this hardly shows
            begun = time.monotonic()
            self.evaluate(n_rows * self.config.seq_len)
            is_first, seconds = seconds == math.inf, time.monotonic() - begun
            self.planner.spent += seconds
            if self.runtime.lead(lambda: not is_first or seconds > self.planner.budget / 100):  # noqa: B023 - called at once
                break
        self.planner.row_seconds = self.runtime.lead(lambda: seconds / max(1, n_rows))
        if self.state.before:
            return
        fitting = self.planner.fitting_rows(n_all)
        self.state.eval_rows = fitting if fitting < n_all else 0
        if self.state.eval_rows:
            minutes = f"{self.config.minutes:g} minutes"
            self.t.progress.say(f"evaluations take {fitting:,} of {n_all:,} held-out rows, to fit into {minutes}")

    def evaluate_ends(self) -> dict[str, float]:
        """Return metrics on all held-out rows, or on as many as fit into a budget of minutes: before and after training."""
        return self.evaluate(self.state.eval_rows * self.config.seq_len or None)

    @property
    def check_tokens(self) -> int:
        """The held-out tokens of an evaluation during training: no more than before and after it."""
        most = self.state.eval_rows * self.config.seq_len
        return min(self.config.eval_tokens, most) if most else self.config.eval_tokens

    def n_rows(self, max_tokens: int | None) -> int:
        """Return how many held-out rows an evaluation of so many tokens takes."""
        n_all = self.t.held_out.n_rows
        return n_all if max_tokens is None else min(n_all, max(1, max_tokens // self.config.seq_len))

    def evaluate_before(self) -> None:
        """Measure the model before its first step."""
        state = self.state
        begun = time.monotonic()
        state.before = self.evaluate_ends()
        self.planner.note_full(time.monotonic() - begun, self.n_ends, self.n_rows(self.check_tokens))
        self.check_metric()
        self.journal.log("eval", {"step": 0, **state.before, "full": True, **self.sampled()})
        self.t.progress.say(f"before training: {brief(state.before)}")
        if self.t.deadline is None:
            self.journal.started = time.monotonic()

    @property
    def n_ends(self) -> int:
        """The held-out rows of the evaluations before and after training."""
        return self.state.eval_rows or self.t.held_out.n_rows

    def sampled(self) -> dict[str, int]:
        """Return what a record says of an evaluation on a part of the held-out rows."""
        return {"rows": self.state.eval_rows} if self.state.eval_rows else {}

    def is_worse(self, after: Mapping[str, float]) -> bool:
        """Return whether the metric is worse than before the first step, or has become no number.

        A metric of generated texts is noise while they are poor: then the loss must be worse too.
        """

        def fell(name: str) -> bool:
            old, new = self.state.before[name], after[name]
            is_better = new >= old if is_higher_better(name) else new <= old
            return not is_better and not math.isnan(old)

        return fell(self.t.metric) and (self.t.score is None or fell("loss"))

    def check_metric(self) -> None:
        """Refuse a metric that the run does not measure.

        Raises: UsageError with those it does.
        """
        if self.t.metric not in self.state.before:
            known = ", ".join(f"`{name}`" for name in self.state.before if name in FIGURES)
            raise UsageError(f"`train.metric` `{self.t.metric}` is not measured in this run", f"measured are {known}")

    def check(self) -> None:
        """Evaluate, show samples, save, and remember the best step."""
        state = self.state
        begun = time.monotonic()
        metrics = self.evaluate(self.check_tokens)
        self.last_check = state.step, metrics
        self.journal.log("eval", {"step": state.step, **metrics})
        self.t.progress.say(f"step {state.step}: validation {brief(metrics)}")
        name = self.t.metric
        before = self.saver.note_step(name, metrics[name])
        state.checked_step = state.step
        self.show_samples()
        if not self.saver.save_if_good():  # without a checkpoint these weights cannot be taken back
            self.saver.forget_step(before)
        if 0 < self.config.patience <= state.checks_since_best and state.step < state.total_steps:
            text = f"stopped early: no better {name} in {state.checks_since_best} evaluations"
            self.journal.event("stopped early", state.step, text)
        self.planner.note_check(time.monotonic() - begun)

    def show_samples(self) -> None:
        """Let the model generate, so that a person sees it learn."""
        if self.t.sample is None or not self.runtime.is_main or self.stepper.is_fsdp:
            return
        self.journal.show(self.state.step, self.t.sample())

    # --- saving and the end -------------------------------------------------------------------------------------------------

    def finish(self) -> Fitted:
        """Keep the best weights, and evaluate them on all held-out rows."""
        # [5] The last weights, or those of the best step if its checkpoint still exists. From here on they may be of
        # another step than the state, so a signal saves nothing any more.
        self.requests.saves_when_stopped = False
        kept = self.saver.take_best()
        if kept != self.state.step:
            self.t.progress.say(f"kept the weights of step {kept}: the best on held-out rows")
        if self.masters:
            self.masters.restore()
        after = self.known_figures(kept) or self.evaluate_ends()
        if self.t.keeps_start and kept and self.is_worse(after) and self.saver.take_start():
            name, trained = self.t.metric, after[self.t.metric]
            after, kept = self.evaluate_ends(), 0
            text = f"training made the model worse: {name} {after[name]:.4g} -> {trained:.4g} on held-out rows; kept it untrained"
            self.journal.event("kept untrained", self.state.step, text)
        self.journal.log("eval", {"step": self.state.step, **after, "full": True, **self.sampled()})
        if few := self.planner.few_steps(self.state):
            self.t.progress.say(few)
        weights = {name: whole_tensor(tensor).detach() for name, tensor in own_tensors(self.saver.holder).items()}
        return Fitted(self.state.before, after, self.state, kept, weights)

    def known_figures(self, kept: int) -> dict[str, float] | None:
        """Return the figures of the last evaluation if it was of the weights that are kept, and on all rows that count."""
        step, metrics = self.last_check
        is_same = kept == step == self.state.step and self.n_rows(self.check_tokens) == self.n_ends
        # Generated answers are counted otherwise than rows. Weights in bfloat16 score a little differently from their float32
        # masters: that is worth a second evaluation, but not out of a budget of minutes.
        is_close = self.masters is None or self.planner.is_timed
        return metrics if is_same and is_close and self.t.score is None else None

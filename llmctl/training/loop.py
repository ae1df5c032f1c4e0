"""fit(): the one training loop.

It sums losses over micro-batches and processes, divides once by the global number of labels, clips, steps, logs,
evaluates and saves. The learning rate, the data and the random numbers of a step are functions of (seed, step), so a
resumed run equals an uninterrupted one. It knows nothing of corpora, teachers or quantizers.

Five decisions, marked in the code: [1] all processes agree before a step; [2] when a step is evaluated, saved or the last;
[3] non-finite gradients and spikes (step.py); [4] which step is the best (saving.py); [5] whose weights are kept at the end.
"""

import time
from dataclasses import replace

import torch
from torch import nn

from llmctl.distributed.sharding import whole_tensor
from llmctl.machine import peak_memory_bytes
from llmctl.metrics.figures import brief, is_higher_better
from llmctl.runs import checkpoint
from llmctl.runs.journal import Journal
from llmctl.training import optim
from llmctl.training.averaging import AVERAGE, Average
from llmctl.training.batch import Batch
from llmctl.training.budget import Planner
from llmctl.training.evaluation import Evaluation
from llmctl.training.inputs import Fitted, Training
from llmctl.training.master_weights import Masters, wants_masters
from llmctl.training.saving import Saver, own_tensors
from llmctl.training.step import Stepper
from llmctl.training.step_sync import Word, agree
from llmctl.training.stop_requests import StopEvaluationError, StopRequests
from llmctl.training.stop_signals import watch_signals


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
        ema, tail = self.config.ema, self.config.average_frac
        self.average = Average(holder.parameters(), ema, tail) if ema or tail else None
        self.saver = Saver(
            checkpoint.Store(training.folder / "checkpoints", self.runtime),
            holder,
            masters,
            self.stepper.optimizers | ({AVERAGE: self.average} if self.average else {}),
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
        self.evaluation = Evaluation(
            training,
            module,
            self.planner,
            self.requests.give_way,
            is_fsdp=self.stepper.is_fsdp,
            is_exact=masters is None,
        )

    def run(self) -> Fitted:
        """Take all steps, then evaluate on all held-out rows."""
        state = self.state
        try:
            if self.planner.is_timed and not state.total_steps:
                self.evaluation.fit_to_budget()
            if not state.before:
                self.evaluate_before()
            else:
                self.evaluation.check_metric()  # a resumed run may have changed it
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
        if self.average and not state.bad_steps:
            self.average.note(state.step, state.total_steps)
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

    def evaluate_before(self) -> None:
        """Measure the model before its first step."""
        state = self.state
        begun = time.monotonic()
        state.before = self.evaluation.ends()
        self.planner.note_full(time.monotonic() - begun, self.evaluation.n_ends, self.evaluation.n_checked)
        self.evaluation.check_metric()
        self.journal.log("eval", {"step": 0, **state.before, "full": True, **self.evaluation.sampled()})
        self.t.progress.say(f"before training: {brief(state.before)}")
        if self.t.deadline is None:
            self.journal.started = time.monotonic()

    def check(self) -> None:
        """Evaluate, show samples, save, and remember the best step."""
        state = self.state
        begun = time.monotonic()
        metrics = self.evaluation.measure(self.evaluation.check_tokens)
        self.evaluation.last = state.step, metrics
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
        after = self.evaluation.known_figures(kept) or self.evaluation.ends()
        if self.average and self.average.is_begun:
            after = self.better_average(after)
        if kept and self.evaluation.is_worse(after):
            name = self.t.metric
            change = f"{self.state.before[name]:.4g} -> {after[name]:.4g}"
            text = f"training made the model worse: {name} {change} on held-out rows"
            hint = ""
            if self.evaluation.is_diverged(after):
                text, hint = f"training diverged: {text}", "\nhint: lower the learning rate (--lr, optim.lr)"
            if self.t.keeps_start and self.saver.take_start():
                after, kept = self.evaluation.ends(), 0
                self.journal.event("kept untrained", self.state.step, f"{text}; kept it untrained{hint}")
            else:
                self.journal.event("worse", self.state.step, text + hint)
        self.journal.log("eval", {"step": self.state.step, **after, "full": True, **self.evaluation.sampled()})
        if few := self.planner.few_steps(self.state):
            self.t.progress.say(few)
        weights = {name: whole_tensor(tensor).detach() for name, tensor in own_tensors(self.saver.holder).items()}
        return Fitted(self.state.before, after, self.state, kept, weights)

    def better_average(self, after: dict[str, float]) -> dict[str, float]:
        """Keep the average of the weights if it is better by the metric than the weights; return the metrics of what is kept."""
        assert self.average is not None
        self.average.swap()
        averaged = self.evaluation.ends()
        name, sign = self.t.metric, 1 if is_higher_better(self.t.metric) else -1
        is_better = sign * averaged[name] > sign * after[name]
        if not is_better:
            self.average.swap()
        text = f"{'kept' if is_better else 'did not keep'} the average of the weights: {name} {averaged[name]:.4g}, "
        self.journal.event("averaged", self.state.step, f"{text}of the weights themselves {after[name]:.4g}")
        return averaged if is_better else after

"""fit(): the one training loop.

It sums losses over micro-batches and processes, divides once by the global number of labels, clips, steps, logs,
evaluates and saves. The learning rate, the data and the random numbers of a step are functions of (seed, step), so a
resumed run equals an uninterrupted one. It knows nothing of corpora, teachers or quantizers.

Five decisions, marked in the code: [1] all processes agree before a step; [2] when a step is evaluated, saved or the last;
[3] non-finite gradients and spikes; [4] which step is the best (saving.py); [5] whose weights are kept at the end.
"""

import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.config import OptimConfig, TrainConfig
from llmctl.distributed.gradients import Gradients, lay_out, make_gradients
from llmctl.distributed.runtime import Runtime
from llmctl.distributed.sharding import is_sharded, whole_tensor
from llmctl.errors import InterruptedRunError, StoppedError, UsageError
from llmctl.losses.base import IGNORE, Loss
from llmctl.machine import peak_memory_bytes
from llmctl.metrics.figures import FIGURES, brief
from llmctl.model.transformer import LanguageModel
from llmctl.runs import checkpoint
from llmctl.runs.journal import Journal, Tracker
from llmctl.runs.progress import Progress
from llmctl.training import optim
from llmctl.training.batch import Batch, BatchSource, idle, positions, to_device
from llmctl.training.budget import Planner
from llmctl.training.held_out import measure
from llmctl.training.master_weights import MasterGradients, Masters, wants_masters
from llmctl.training.objectives import Objective
from llmctl.training.saving import Saver, own_tensors
from llmctl.training.state import State
from llmctl.training.step_sync import Word, agree
from llmctl.training.stop_signals import Caught, watch_signals

LIMIT_RESERVE_SECONDS = 5.0
"""Time between the end of a run and its time limit, besides what saving takes."""


@dataclass
class Training:
    """Everything `fit` works with.

    deadline, limit: on the clock of `time.monotonic`: the end of a budget of minutes; when this process must have ended.
    sample, score: generate samples, and metrics that need generated text, at every evaluation.
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


class _StopEvaluationError(Exception):
    """A signal came during an evaluation, which is repeated when the run resumes."""


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
    with watch_signals() as caught, loop.loader:
        loop.caught = caught
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
        self.parameters = [p for p in holder.parameters() if p.requires_grad]
        self.optimizers = optim.make_optimizers(holder, training.optim, self.runtime.dtype)
        self.gradients: Gradients = (
            MasterGradients(self.runtime, module, masters)
            if masters
            else make_gradients(self.runtime, module, self.parameters)
        )
        self.journal = Journal(training.folder, training.progress, training.trackers, is_open=self.runtime.is_main)
        self.saver = Saver(
            checkpoint.Store(training.folder / "checkpoints", self.runtime),
            holder,
            masters,
            self.optimizers,
            self.state,
            self.config,
            self.runtime,
            self.journal,
            training.recipe,
            training.resume_command,
        )
        self.planner = Planner(self.config, training.deadline, training.train.n_rows)
        self.longest: dict[str, float] = {}
        self.caught = Caught()
        layout = lay_out(
            self.config.batch_size, self.config.micro_batch_size, self.runtime.parallel, self.runtime.world_size
        )
        self.own_rows = layout[self.runtime.rank]
        self.first_part = sum(len(parts) for parts in layout[: self.runtime.rank])
        self.n_parts = sum(len(parts) for parts in layout)
        # Sharded weights are gathered in every forward pass, so all processes must make equally many: idle ones fill up.
        self.is_fsdp = self.runtime.world_size > 1 and any(is_sharded(p) for p in self.parameters)
        self.n_idle = max(len(parts) for parts in layout) - len(self.own_rows) if self.is_fsdp else 0
        self.loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.ahead: tuple[int, Future[list[Batch]]] | None = None
        self.is_over = False

    def run(self) -> Fitted:
        """Take all steps, then evaluate on all held-out rows."""
        state = self.state
        try:
            if not state.before:
                self.evaluate_before()
            self.planner.begin(state)
            if self.config.on_divergence == "rollback" and state.step == 0:
                self.save()
            while True:
                # [2] An evaluation saves too; patience makes the step that was just evaluated the last one.
                if self.planner.is_check_due(state):
                    with self.timing("check"):
                        self.check()
                elif self.planner.is_save_due(state):
                    self.save_if_good()
                if 0 < self.config.patience <= state.checks_since_best and state.step == state.checked_step:
                    state.total_steps = state.step
                loading_seconds, batches = self.load_batches()
                # [1] What depends on a clock or a signal is known to one process only: their words are summed, so that
                # all take the same step, or none does.
                agreed = agree(self.runtime, self.word(batches))
                state.total_steps = int(agreed.total_steps)
                if state.step >= state.total_steps:
                    if not self.planner.is_check_due(state):
                        break
                    continue  # the plan has just become shorter: this was the last step
                self.obey(agreed)
                with self.timing("step"):
                    self.train_step(batches, agreed, loading_seconds)
                state.seconds = self.journal.seconds
                if self.runtime.is_main:
                    self.planner.revise(state)
            return self.finish()
        except _StopEvaluationError:
            self.stop(self.caught.number)
            raise

    # --- agreement between processes ----------------------------------------------------------------------------------------

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
            at_limit=is_main and self.t.limit is not None and now + self.reserve() >= self.t.limit,
            total_steps=self.state.total_steps if is_main else 0,
        )

    def reserve(self) -> float:
        """Return the seconds to keep before the limit: twice the longest step, evaluation and save so far, and a few more."""
        return 2 * sum(self.longest.values()) + LIMIT_RESERVE_SECONDS

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Remember how long something takes at most."""
        begun = time.monotonic()
        yield
        self.longest[what] = max(self.longest.get(what, 0.0), time.monotonic() - begun)

    def obey(self, agreed: Word) -> None:
        """Stop or save if a signal, the limit or the clock asks for it."""
        if agreed.number:
            self.stop(agreed.number)
        if agreed.at_limit:
            self.save(is_needed=True)
            raise StoppedError(
                f"stopped at the time limit, at step {self.state.step} of {self.state.total_steps}, checkpoint saved",
                f"resume with: {self.t.resume_command}",
            )
        if agreed.wants_save:
            self.save()

    # --- a step -----------------------------------------------------------------------------------------------------------

    def load_batches(self) -> tuple[float, list[Batch]]:
        """Return the seconds waited for a step's batches, and the batches; a thread makes the next step's meanwhile."""
        begun = time.perf_counter()
        size = self.config.batch_size
        first = (self.state.step + self.state.skipped_batches) * size
        ahead, self.ahead = self.ahead, None
        batches = ahead[1].result() if ahead is not None and ahead[0] == first else self.make_batches(first)
        seconds = time.perf_counter() - begun
        self.ahead = (first + size, self.loader.submit(self.make_batches, first + size))
        return seconds, batches

    def make_batches(self, first: int) -> list[Batch]:
        """Return this process's micro-batches of the step whose rows begin at `first`."""
        return [self.t.train.batch(range(first + rows.start, first + rows.stop)) for rows in self.own_rows]

    def train_step(self, batches: list[Batch], agreed: Word, loading_seconds: float) -> None:
        """Take one optimizer step, and log it."""
        state = self.state
        begun = time.perf_counter()
        lr_frac = optim.schedule(state.step, state.total_steps, self.t.optim) * state.lr_scale
        optim.set_rates(self.optimizers, self.t.optim, lr_frac)
        self.t.objective.progress = state.step / max(1, state.total_steps)
        loss = self.accumulate(batches, max(1, int(agreed.labels)))
        limit = self.t.optim.clip_norm or float("inf")
        norm = float(whole_tensor(nn.utils.clip_grad_norm_(self.parameters, limit)))
        self.apply(loss, norm)
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
        left = (state.total_steps - state.step) * (state.seconds / max(1, state.step))
        self.t.progress.step(record, state.total_steps, left)
        if state.bad_steps >= self.config.max_bad_steps:
            self.saver.roll_back()

    def accumulate(self, batches: list[Batch], n_labels: int) -> float:
        """Run forward and backward over all micro-batches, and return the mean loss over the labels of all processes.

        Sums are divided once, by the global count: a mean of means would weigh labels of short rows more.
        """
        scale = self.gradients.scale(n_labels)
        losses = torch.zeros(self.n_parts, dtype=torch.float64, device=self.runtime.device)
        for number, batch in enumerate([*batches, *[idle(batches[0])] * self.n_idle]):
            index = self.first_part + number
            self.seed_dropout(self.state.step, index)
            with self.gradients.part(is_last=number == len(batches) - 1):
                loss: Loss = self.module(to_device(batch, self.runtime.device))
                self.runtime.backward(loss.sum * scale)
            self.gradients.collect()
            if number < len(batches):
                losses[index] = loss.sum.detach()
        self.gradients.finish()
        # Every micro-batch has a slot of its own, so that the sum does not depend on the number of processes.
        return math.fsum(self.runtime.sum(losses).tolist()) / n_labels

    def utilization(self, tokens_per_second: float) -> float | None:
        """Return the share of the measured matmul rate that the model's own FLOPs use."""
        if not self.t.peak_flops:
            return None
        return tokens_per_second * self.t.flops_per_token / self.t.peak_flops / self.runtime.world_size

    def apply(self, loss: float, norm: float) -> None:
        """Step the optimizers, unless loss or gradient are not finite: then skip the step and count it."""
        state = self.state
        # [3] Both numbers are the same in all processes, so all skip together. A spike is only reported, unless
        # `skip_spikes`; too many non-finite steps in a row roll back or end the run.
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        spike = state.spike(loss, norm) if is_finite else ""
        if spike:
            self.journal.event("spike", state.step + 1, f"step {state.step + 1} is a spike: {spike}")
        if is_finite and not (spike and self.config.skip_spikes):
            state.bad_steps = 0
            for optimizer in self.optimizers.values():
                optimizer.step()
            if self.masters:
                self.masters.push()
        else:
            state.skipped_steps += 1
            if not is_finite:
                state.bad_steps += 1
                text = f"step {state.step + 1} skipped: loss {loss}, gradient norm {norm}"
                self.journal.event("not finite", state.step + 1, text)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def seed_dropout(self, step: int, index: int) -> None:
        """Make the random numbers of a forward pass a function of (seed, step, micro-batch), so that none need saving."""
        key = f"{self.config.seed}/{step}/{index}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))

    # --- evaluation ---------------------------------------------------------------------------------------------------------

    def evaluate(self, max_tokens: int | None) -> dict[str, float]:
        """Return metrics on held-out rows: all of them, or evenly spaced ones of `max_tokens`.

        Raises: _StopEvaluationError in all processes if one got a signal.
        """
        metrics = measure(
            self.module,
            self.t.objective,
            self.t.held_out,
            self.config,
            self.runtime,
            max_tokens,
            self.give_way,
            sharded=self.is_fsdp,
        )
        if self.t.score is not None and not self.is_fsdp:  # a sharded model cannot generate
            metrics |= self.t.score(max_tokens)
        return metrics

    def give_way(self) -> None:
        """Let a signal end a long evaluation, in all processes at once."""
        number = torch.tensor(float(self.caught.number), device=self.runtime.device)
        if float(self.runtime.sum(number)):
            raise _StopEvaluationError

    def evaluate_before(self) -> None:
        """Measure the model before its first step."""
        state = self.state
        state.before = self.evaluate(None)
        if self.t.metric not in state.before:
            known = ", ".join(f"`{name}`" for name in state.before if name in FIGURES)
            raise UsageError(f"`train.metric` `{self.t.metric}` is not measured in this run", f"measured are {known}")
        self.journal.log("eval", {"step": 0, **state.before, "full": True})
        self.t.progress.say(f"before training: {brief(state.before)}")
        if self.t.deadline is None:
            self.journal.started = time.monotonic()

    def check(self) -> None:
        """Evaluate, show samples, save, and remember the best step."""
        state = self.state
        metrics = self.evaluate(self.config.eval_tokens)
        self.journal.log("eval", {"step": state.step, **metrics})
        self.t.progress.say(f"step {state.step}: validation {brief(metrics)}")
        name = self.t.metric
        before = self.saver.note_step(name, metrics[name])
        state.checked_step = state.step
        self.show_samples()
        if not self.save_if_good():  # without a checkpoint these weights cannot be taken back
            self.saver.forget_step(before)
        if 0 < self.config.patience <= state.checks_since_best and state.step < state.total_steps:
            text = f"stopped early: no better {name} in {state.checks_since_best} evaluations"
            self.journal.event("stopped early", state.step, text)

    def show_samples(self) -> None:
        """Let the model generate, so that a person sees it learn."""
        if self.t.sample is None or not self.runtime.is_main or self.is_fsdp:
            return
        self.journal.show(self.state.step, self.t.sample())

    # --- saving and the end -------------------------------------------------------------------------------------------------

    def save(self, *, is_needed: bool = False) -> bool:
        """Save a checkpoint, and remember how long that takes; see `Saver.save`."""
        with self.timing("save"):
            return self.saver.save(is_needed=is_needed)

    def save_if_good(self) -> bool:
        """Save, unless the last steps were not finite: the weights that they started from may be the cause."""
        return not self.state.bad_steps and self.save()

    def stop(self, number: int) -> None:
        """Save and stop after a signal.

        Raises: InterruptedRunError.
        """
        # A signal during an evaluation may have reached another process only.
        number = max(self.runtime.gather(number))
        name, hint = signal.Signals(number).name, f"resume with: {self.t.resume_command}"
        if not self.state.before:
            raise InterruptedRunError(f"stopped by {name} before the first step", hint, number)
        if not self.is_over:
            self.save(is_needed=True)
        raise InterruptedRunError(
            f"stopped by {name} at step {self.state.step} of {self.state.total_steps}, checkpoint saved", hint, number
        )

    def finish(self) -> Fitted:
        """Keep the best weights, and evaluate them on all held-out rows."""
        # [5] The last weights, or those of the best step if its checkpoint still exists. From here on they may be of
        # another step than the state, so a signal saves nothing any more.
        self.is_over = True
        kept = self.saver.take_best()
        if kept != self.state.step:
            self.t.progress.say(f"kept the weights of step {kept}: the best on held-out rows")
        if self.masters:
            self.masters.restore()
        after = self.evaluate(None)
        self.journal.log("eval", {"step": self.state.step, **after, "full": True})
        weights = {name: whole_tensor(tensor).detach() for name, tensor in own_tensors(self.saver.holder).items()}
        return Fitted(self.state.before, after, self.state, kept, weights)

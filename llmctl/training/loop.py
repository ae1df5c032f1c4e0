"""fit(): the one training loop.

It sums losses over micro-batches and processes, divides once by the global number of labels, clips, steps, logs,
evaluates and saves. The learning rate, the data and the random numbers of a step are functions of (seed, step), so a
run that was stopped goes on as if it had not been. What depends on a clock or a signal is agreed on before a step, so
that all processes do the same. It never hears of corpora, teachers or quantizers.
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
from llmctl.distributed.runtime import Runtime, describe_environment, differences
from llmctl.distributed.sharding import fill, is_sharded, local, own_parts, whole_tensor
from llmctl.errors import ArtifactError, DivergedError, InterruptedRunError, OutputError, StoppedError
from llmctl.losses.base import IGNORE, Loss
from llmctl.machine import peak_memory_bytes
from llmctl.metrics.figures import brief, is_higher_better
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
from llmctl.training.state import State
from llmctl.training.step_sync import Word, agree
from llmctl.training.stop_signals import Caught, watch_signals

LIMIT_RESERVE_SECONDS = 5.0
"""Time between the end of a run and its time limit, besides what saving takes."""


@dataclass
class Training:
    """Everything `fit` works with."""

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
    """What came out: figures before and after, the course, which step's weights are in the model, and the weights."""

    before: dict[str, float]
    after: dict[str, float]
    state: State
    kept_step: int
    weights: dict[str, Tensor]


class _StopEvaluationError(Exception):
    """A signal came in the middle of an evaluation; it is made again when the run goes on."""


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
    holder = masters.master if masters else training.model
    optimizers = optim.make_optimizers(holder, training.optim, training.runtime.dtype)
    loop = _Loop(training, module, optimizers, masters)
    if restored is not None:
        loop.restore(restored)
    state = training.state
    # Where there was no checkpoint yet, everything is done again.
    loop.journal.cut_after(*(state.step, state.checked_step) if state.before else (-1, -1))
    with watch_signals() as caught, loop.loader:
        loop.caught = caught
        try:
            return loop.run()
        finally:
            loop.journal.close()


class _Loop:
    """The state of one call of fit."""

    def __init__(
        self,
        training: Training,
        module: nn.Module,
        optimizers: dict[str, torch.optim.Optimizer],
        masters: Masters | None = None,
    ) -> None:
        self.t, self.module, self.optimizers, self.masters = training, module, optimizers, masters
        # What is optimized and saved: the model itself, or the float32 master of a bfloat16 one.
        self.holder = masters.master if masters else training.model
        self.config, self.runtime, self.state = training.config, training.runtime, training.state
        self.journal = Journal(training.folder, training.progress, training.trackers, is_open=training.runtime.is_main)
        self.store = checkpoint.Store(training.folder / "checkpoints", training.runtime)
        self.parameters = [p for p in self.holder.parameters() if p.requires_grad]
        if masters:
            self.gradients: Gradients = MasterGradients(training.runtime, module, masters)
        else:
            self.gradients = make_gradients(training.runtime, module, self.parameters)
        self.planner = Planner(training.config, training.deadline, training.train.n_rows)
        self.saved_at = time.monotonic()
        self.longest: dict[str, float] = {}
        self.caught = Caught()
        layout = lay_out(
            self.config.batch_size, self.config.micro_batch_size, training.runtime.parallel, self.runtime.world_size
        )
        self.own_rows = layout[self.runtime.rank]
        self.first_part = sum(len(parts) for parts in layout[: self.runtime.rank])
        self.n_parts = sum(len(parts) for parts in layout)
        # Sharded weights are gathered in every forward pass: all processes must make as many.
        is_fsdp = self.runtime.world_size > 1 and any(is_sharded(p) for p in self.parameters)
        self.n_idle = max(len(parts) for parts in layout) - len(self.own_rows) if is_fsdp else 0
        self.is_fsdp = is_fsdp
        self.loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.ahead: tuple[int, Future[list[Batch]]] | None = None
        self.is_over = False
        if self.runtime.is_main:
            self.store.sweep()

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Take over weights, optimizer state and numbers of a checkpoint; say what keeps the bits from being equal."""
        self.load(saved)
        self.state.take(saved.state)
        changed = differences(
            saved.state.get("environment", {}),
            describe_environment(self.runtime),
            deterministic=self.runtime.parallel.deterministic,
        )
        if changed:
            self.t.progress.say(f"the resumed run is not the same bit for bit: {', '.join(changed)}")
        if budget(saved.state.get("recipe")) != budget(self.t.recipe):
            self.state.total_steps = 0
        self.journal.started = time.monotonic() - self.state.seconds
        self.store.verified.add(saved.path.name)

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Take over weights and optimizer state."""
        self.load_weights(saved)
        optim.load_state(self.holder, self.optimizers, saved)

    def load_weights(self, saved: checkpoint.Checkpoint) -> None:
        """Take over the weights.

        Raises: ArtifactError if they are of another model.
        """
        named = own_tensors(self.holder, frozen=False)
        if set(named) != set(saved.names("model")):
            odd = sorted(set(named) ^ set(saved.names("model")))
            raise ArtifactError(f"checkpoint `{saved.path}` is of another model: `{odd[0]}`", "resume with its recipe")
        for name, tensor in named.items():
            fill(tensor, lambda *rows, name=name: saved.read("model", name, *rows))
        if self.masters:
            self.masters.push()

    def run(self) -> Fitted:
        """Take all steps, then measure on all held-out text."""
        state = self.state
        try:
            if not state.before:
                state.before = self.evaluate(None)
                self.journal.log("eval", {"step": 0, **state.before, "full": True})
                self.t.progress.say(f"before training: {brief(state.before)}")
                if self.t.deadline is None:
                    self.journal.started = time.monotonic()
            self.planner.begin(state)
            if self.config.on_divergence == "rollback" and state.step == 0:
                self.save()
            while True:
                if self.planner.is_check_due(state):
                    with self.timing("check"):
                        self.check()
                elif self.planner.is_save_due(state):
                    self.save_if_good()
                if 0 < self.config.patience <= state.checks_since_best and state.step == state.checked_step:
                    state.total_steps = state.step
                loading_seconds, batches = self.load_batches()
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

    def word(self, batches: Sequence[Batch]) -> Word:
        """Return what this process has to say before a step."""
        number, wants_save = self.caught.number, self.caught.wants_save
        self.caught.wants_save = False
        is_main, now, minutes = self.runtime.is_main, time.monotonic(), self.config.save_minutes
        return Word(
            labels=sum(int((batch["labels"] != IGNORE).sum()) for batch in batches),
            positions=sum(map(positions, batches)),
            sigint=number == signal.SIGINT,
            sigterm=number == signal.SIGTERM,
            sighup=number == signal.SIGHUP,
            wants_save=wants_save or (is_main and minutes > 0 and now - self.saved_at >= 60 * minutes),
            at_limit=is_main and self.t.limit is not None and now + self.reserve() >= self.t.limit,
            total_steps=self.state.total_steps if is_main else 0,
        )

    def reserve(self) -> float:
        """Return the seconds that a step, what may follow it, and saving have taken at most, with some to spare."""
        return 2 * sum(self.longest.values()) + LIMIT_RESERVE_SECONDS

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Remember how long something takes at most."""
        begun = time.monotonic()
        yield
        self.longest[what] = max(self.longest.get(what, 0.0), time.monotonic() - begun)

    def obey(self, agreed: Word) -> None:
        """End or save where a signal, the limit or the clock asks for it."""
        if agreed.number:
            self.stop(agreed.number)
        if agreed.at_limit:
            self.save(is_needed=True)
            raise StoppedError(
                f"stopped at the time limit, at step {self.state.step} of {self.state.total_steps}, checkpoint saved",
                f"go on with: {self.t.resume_command}",
            )
        if agreed.wants_save:
            self.save()

    def load_batches(self) -> tuple[float, list[Batch]]:
        """Return the seconds waited for a step's batches, and them; the next step's are made meanwhile."""
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
        """Take one optimizer step: accumulate, divide by the global count, clip, step, log."""
        state = self.state
        begun = time.perf_counter()
        share = optim.schedule(state.step, state.total_steps, self.t.optim) * state.lr_scale
        optim.set_rates(self.optimizers, self.t.optim, share)
        self.t.objective.progress = state.step / max(1, state.total_steps)
        scale = self.gradients.scale(max(1, int(agreed.labels)))
        losses = torch.zeros(self.n_parts, dtype=torch.float64, device=self.runtime.device)
        for place, batch in enumerate([*batches, *[idle(batches[0])] * self.n_idle]):
            index = self.first_part + place
            self.seed_dropout(state.step, index)
            with self.gradients.part(is_last=place == len(batches) - 1):
                loss: Loss = self.module(to_device(batch, self.runtime.device))
                self.runtime.backward(loss.sum * scale)
            self.gradients.collect()
            if place < len(batches):
                losses[index] = loss.sum.detach()
        self.gradients.finish()
        loss_value = math.fsum(self.runtime.sum(losses).tolist()) / max(1, agreed.labels)
        limit = self.t.optim.clip_norm or float("inf")
        norm = float(whole_tensor(nn.utils.clip_grad_norm_(self.parameters, limit)))
        self.apply(loss_value, norm)
        state.step += 1
        state.labels += int(agreed.labels)
        state.tokens += int(agreed.positions)
        seconds = time.perf_counter() - begun + loading_seconds
        record = {
            "step": state.step,
            "loss": loss_value,
            "lr": self.t.optim.lr * share,
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
            self.diverge()

    def utilization(self, tokens_per_second: float) -> float | None:
        """Return the share of the measured product rate that the model's own FLOPs use."""
        if not self.t.peak_flops:
            return None
        return tokens_per_second * self.t.flops_per_token / self.t.peak_flops / self.runtime.world_size

    def apply(self, loss: float, norm: float) -> None:
        """Step the optimizers, unless loss or gradient are not finite: then skip the step and count it.

        Both numbers are the same in all processes, so all skip together.
        """
        state = self.state
        spike = ""
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        if is_finite:
            spike = state.spike(loss, norm)
        if spike:
            self.journal.event("spike", state.step + 1, f"step {state.step + 1} stands out: {spike}")
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

    def diverge(self) -> None:
        """Go back to the last checkpoint with a smaller learning rate and other data, or give up.

        Raises: DivergedError.
        """
        state, config = self.state, self.config
        what = f"training diverged: {state.bad_steps} steps in a row without a finite loss (step {state.step})"
        if config.on_divergence == "stop" or state.rollbacks >= config.max_rollbacks:
            raise DivergedError(
                what,
                f"lower optim.lr, or --set train.on_divergence=rollback; the last checkpoint stands: {self.store.folder}",
            )
        saved = self.open_newest_good()
        failed, skipped_steps, rollbacks = state.step, state.skipped_steps, state.rollbacks
        lr_scale, skipped_batches = state.lr_scale, state.skipped_batches
        self.load(saved)
        state.take(saved.state)
        state.skipped_steps, state.rollbacks = skipped_steps, rollbacks + 1
        state.lr_scale = lr_scale * config.rollback_lr_frac
        # The rows that led here do not come again: the step numbers go back, the data does not.
        state.skipped_batches = skipped_batches + failed - state.step
        text = f"{what}; back to step {state.step} with {state.lr_scale:g} of the learning rate"
        self.journal.event("rollback", state.step, text)

    def open_newest_good(self) -> checkpoint.Checkpoint:
        """Open the newest valid checkpoint from before the steps that were not finite, the same in every process.

        Raises: DivergedError if there is none.
        """
        good = (
            path.name
            for path in self.store.published()
            if self.store.is_valid(path) and not checkpoint.open_checkpoint(path).state["bad_steps"]
        )
        name = self.runtime.lead(lambda: next(good, None))
        if name is None:
            raise DivergedError("training diverged, and there is no checkpoint to go back to", "lower optim.lr")
        return checkpoint.open_checkpoint(self.store.folder / name)

    def seed_dropout(self, step: int, index: int) -> None:
        """Make the random numbers of a forward pass a function of where it is, so that none need saving."""
        key = f"{self.config.seed}/{step}/{index}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))

    def evaluate(self, max_tokens: int | None) -> dict[str, float]:
        """Return the figures on held-out rows, all of them or evenly spread ones.

        Raises: _StopEvaluationError in all processes if one got a signal.
        """
        figures = measure(
            self.module,
            self.t.objective,
            self.t.held_out,
            self.config,
            self.runtime,
            max_tokens,
            self.give_way,
            sharded=self.is_fsdp,
        )
        if self.t.score is not None and not self.is_fsdp:  # a sharded model cannot write
            figures |= self.t.score(max_tokens)
        return figures

    def give_way(self) -> None:
        """Let a signal end a long evaluation, in all processes at once."""
        number = torch.tensor(float(self.caught.number), device=self.runtime.device)
        if float(self.runtime.sum(number)):
            raise _StopEvaluationError

    def check(self) -> None:
        """Evaluate, show samples, save, and remember the best step."""
        state = self.state
        figures = self.evaluate(self.config.eval_tokens)
        self.journal.log("eval", {"step": state.step, **figures})
        self.t.progress.say(f"step {state.step}: held out {brief(figures)}")
        best = state.best_value, state.best_step, state.checks_since_best
        name = self.t.metric
        value = figures[name]
        # What cannot be told, such as a correlation with a constant, is no better than anything.
        sign = 1 if is_higher_better(name) else -1
        is_best = state.best_value is None or sign * value >= sign * state.best_value
        if is_best and not math.isnan(value):
            state.best_value, state.best_step, state.checks_since_best = value, state.step, 0
        else:
            state.checks_since_best += 1
        state.checked_step = state.step
        self.show_samples()
        if not self.save_if_good():  # without a checkpoint these weights cannot be taken back
            state.best_value, state.best_step, state.checks_since_best = best
        if 0 < self.config.patience <= state.checks_since_best and state.step < state.total_steps:
            text = f"stopped early: no better {name} in {state.checks_since_best} evaluations"
            self.journal.event("stopped early", state.step, text)

    def save_if_good(self) -> bool:
        """Save, unless the last steps were not finite: what they started from may be what is wrong."""
        return not self.state.bad_steps and self.save()

    def show_samples(self) -> None:
        """Let the model write, so that a person sees it learn."""
        if self.t.sample is None or not self.runtime.is_main or self.is_fsdp:
            return
        self.journal.show(self.state.step, self.t.sample())

    def save(self, *, is_needed: bool = False) -> bool:
        """Publish a checkpoint, then delete what rotation allows; tell whether it is there.

        A save that fails on the way is a warning, the next one may succeed; one that is needed raises.
        Raises: OutputError, DivergedError if weights are not finite.
        """
        weights = own_tensors(self.holder, frozen=False)
        finite = torch.tensor(float(all(bool(torch.isfinite(local(w)).all()) for w in weights.values())))
        if float(self.runtime.sum(finite.to(self.runtime.device))) < self.runtime.world_size:
            raise DivergedError(
                f"training diverged: weights are not finite at step {self.state.step}; no checkpoint was made of them",
                f"lower optim.lr, then {self.t.resume_command}",
            )
        rank = self.runtime.rank
        optimizer = dict(optim.named_state(self.holder, self.optimizers))
        self.state.trackers = self.journal.tracker_ids()
        extra = {"environment": describe_environment(self.runtime), "recipe": dict(self.t.recipe)}
        self.saved_at = time.monotonic()
        try:
            with self.timing("save"):
                self.store.save(
                    self.state.step, own_parts(weights, rank), own_parts(optimizer, rank), self.state.to_dict() | extra
                )
        except OutputError as error:
            if is_needed:
                raise
            text = f"step {self.state.step} was not saved: {error} (hint: {error.hint})"
            self.journal.event("not saved", self.state.step, text)
            return False
        best = self.store.folder / checkpoint.name_of(self.state.best_step)
        self.store.rotate(self.config.keep_checkpoints, best)
        return True

    def stop(self, number: int) -> None:
        """Save and end because a signal came.

        Raises: InterruptedRunError.
        """
        # A signal in the middle of an evaluation may have reached another process only.
        number = max(self.runtime.gather(number))
        name = signal.Signals(number).name
        if not self.state.before:
            raise InterruptedRunError(
                f"stopped by {name} before the first step", f"go on with: {self.t.resume_command}", number
            )
        if not self.is_over:
            self.save(is_needed=True)
        raise InterruptedRunError(
            f"stopped by {name} at step {self.state.step} of {self.state.total_steps}, checkpoint saved",
            f"go on with: {self.t.resume_command}",
            number,
        )

    def finish(self) -> Fitted:
        """Take the best weights back if the last ones are not, and measure on all held-out text."""
        self.is_over = True  # the weights may be those of another step from here on
        kept = self.state.step
        best = self.store.folder / checkpoint.name_of(self.state.best_step)
        has_best = self.runtime.first(self.state.best_step not in (-1, self.state.step) and best.is_dir())
        if has_best:
            self.load_weights(checkpoint.load(best))
            kept = self.state.best_step
            self.t.progress.say(f"the weights of step {kept} were better on held-out text and are kept")
        if self.masters:
            self.masters.restore()
        after = self.evaluate(None)
        self.journal.log("eval", {"step": self.state.step, **after, "full": True})
        weights = {name: whole_tensor(tensor).detach() for name, tensor in own_tensors(self.holder).items()}
        return Fitted(self.state.before, after, self.state, kept, weights)


def budget(recipe: Any) -> Any:
    """Return what of a recipe decides the number of steps."""
    train = (recipe or {}).get("train", {})
    return [train.get(name) for name in ("steps", "tokens", "minutes")]


def own_tensors(model: nn.Module, *, frozen: bool = True) -> dict[str, Tensor]:
    """Return the state dict with a tied weight once only; frozen weights, which nothing changes, if asked for."""
    seen: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and (frozen or tensor.requires_grad):
            seen[id(tensor)] = name
            tensors[name] = tensor.detach()
    return tensors

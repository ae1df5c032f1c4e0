"""fit(): the one training loop.

It sums losses over micro-batches and processes, divides once by the global number of labels, clips, steps, logs,
evaluates and saves. The learning rate and the data of a step are functions of (seed, step), so a run that was
stopped goes on as if it had not been. It never hears of corpora, teachers or quantizers.
"""

import hashlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llmctl.config import OptimConfig, TrainConfig
from llmctl.engine import checkpoint, optim
from llmctl.engine.metrics import MetricsFile, Sums
from llmctl.engine.progress import Progress
from llmctl.engine.runtime import Runtime
from llmctl.errors import DivergedError, InterruptedRunError
from llmctl.losses import IGNORE, Loss
from llmctl.model.transformer import LanguageModel, load_tensors

MAX_BAD_STEPS = 20
"""Steps in a row with a non-finite loss or gradient after which a run is given up."""


class BatchSource(Protocol):
    """Batches by row number: the endless training stream, or the rows of a held-out set."""

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""

    def batch(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the arrays of these rows; `labels` among them."""


@dataclass
class State:
    """What changes while training, besides weights and optimizer; saved with every checkpoint."""

    step: int = 0
    total_steps: int = 0
    labels: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int = -1
    bad_steps: int = 0
    skipped_steps: int = 0


@dataclass
class Training:
    """Everything `fit` works with."""

    objective: nn.Module
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
    sample: Callable[[], list[dict[str, str]]] | None = None
    state: State = field(default_factory=State)


@dataclass(frozen=True)
class Fitted:
    """What came out: figures before and after, the course, and which step's weights are in the model."""

    before: dict[str, float]
    after: dict[str, float]
    state: State
    kept_step: int


def fit(training: Training, restored: checkpoint.Checkpoint | None = None) -> Fitted:
    """Train until the budget is used up, and leave the best weights in the model.

    Raises: InterruptedRunError after a signal (saved), DivergedError after
    MAX_BAD_STEPS non-finite steps in a row.
    """
    module = training.runtime.prepare(training.objective)
    if training.config.compile:
        module = torch.compile(module)  # type: ignore[assignment]
    optimizers = optim.make_optimizers(training.model, training.optim)
    loop = _Loop(training, module, optimizers)
    if restored is not None:
        loop.restore(restored)
    with watch_signals() as caught:
        return loop.run(caught)


class _Loop:
    """The state of one call of fit."""

    def __init__(self, training: Training, module: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        self.t, self.module, self.optimizers = training, module, optimizers
        self.state = training.state
        self.metrics = MetricsFile(training.folder / "metrics.jsonl")
        self.before: dict[str, float] = {}
        self.parameters = [p for p in training.model.parameters() if p.requires_grad]
        self.started = time.monotonic()
        self.planner = Planner(training)

    @property
    def checkpoints(self) -> Path:
        return self.t.folder / "checkpoints"

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Take over weights, optimizer state and numbers of a checkpoint."""
        load_tensors(self.t.model, saved.model)
        optim.load_state(self.t.model, self.optimizers, saved.optimizer)
        values = dict(saved.state)
        self.before = values.pop("before")
        for name, value in values.items():
            setattr(self.state, name, value)
        self.metrics.cut_after(self.state.step)
        self.started = time.monotonic() - self.state.seconds

    def run(self, caught: "Caught") -> Fitted:
        """Take all steps, then measure on all held-out text."""
        if not self.before:
            self.before = self.evaluate(None).figures()
            self.log("eval", {"step": 0, **self.before, "full": True})
            self.t.progress.say(f"before training: {brief(self.before)}")
            if self.t.deadline is None:
                self.started = time.monotonic()
        self.planner.begin(self.state)
        while self.state.step < self.state.total_steps:
            self.train_step()
            self.state.seconds = time.monotonic() - self.started
            self.planner.revise(self.state)
            is_last = self.state.step >= self.state.total_steps
            if is_last or self.state.step % self.planner.eval_every(self.state) == 0:
                self.check()
            elif self.state.step % self.planner.save_every(self.state) == 0:
                self.save()
            if caught.number and not is_last:
                self.stop(caught.number)
        return self.finish()

    def train_step(self) -> None:
        """Take one optimizer step: accumulate, reduce the counts once, clip, step, log."""
        config, state = self.t.config, self.state
        begun = time.perf_counter()
        share = optim.schedule(state.step, state.total_steps, self.t.optim)
        optim.set_rates(self.optimizers, self.t.optim, share)
        micro_batches = list(self.micro_batches(state.step))
        loading_seconds = time.perf_counter() - begun
        own = sum(int((batch["labels"] != IGNORE).sum()) for batch in micro_batches)
        count = max(1, int(self.t.runtime.sum(torch.tensor(own, device=self.t.runtime.device))))
        total = torch.zeros((), dtype=torch.float64, device=self.t.runtime.device)
        for index, batch in enumerate(micro_batches):
            self.seed_dropout(state.step, index)
            loss: Loss = self.module(self.to_device(batch))
            # Distributed wrappers average gradients over processes; times their number makes it the sum we want.
            self.t.runtime.backward(loss.sum * (self.t.runtime.world_size / count))
            total += loss.sum.detach()
        loss_value = float(self.t.runtime.sum(total)) / count
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.t.optim.clip_norm or float("inf")))
        self.apply(loss_value, norm)
        state.step += 1
        state.labels += count
        seen = sum(batch["labels"].size for batch in micro_batches) * self.t.runtime.world_size
        state.tokens += seen
        seconds = time.perf_counter() - begun
        record = {
            "step": state.step,
            "loss": loss_value,
            "lr": self.t.optim.lr * share,
            "grad_norm": norm,
            "tokens": state.tokens,
            "tokens_per_second": seen / seconds,
            "memory_bytes": peak_memory_bytes(self.t.runtime.device),
            "loader_share": loading_seconds / seconds,
            "utilisation": self.utilisation(seen / seconds),
        }
        if state.step % config.log_every == 0 or state.step in (1, state.total_steps):
            self.log("train", record)
        left = (state.total_steps - state.step) * (state.seconds / max(1, state.step))
        self.t.progress.step(record, state.total_steps, left)

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Return the share of the measured product rate that the model's own FLOPs use."""
        if not self.t.peak_flops:
            return None
        return tokens_per_second * self.t.flops_per_token / self.t.peak_flops / self.t.runtime.world_size

    def apply(self, loss: float, norm: float) -> None:
        """Step the optimizers, unless loss or gradient are not finite: then skip the step and count it."""
        state = self.state
        if np.isfinite(loss) and np.isfinite(norm):
            state.bad_steps = 0
            for optimizer in self.optimizers.values():
                optimizer.step()
        else:
            state.bad_steps += 1
            state.skipped_steps += 1
            self.t.progress.say(f"step {state.step + 1} skipped: loss {loss}, gradient norm {norm}")
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if state.bad_steps >= MAX_BAD_STEPS:
            raise DivergedError(
                f"training diverged: {state.bad_steps} steps in a row without a finite loss (step {state.step + 1})",
                f"lower optim.lr, then {self.t.resume_command} or start again",
            )

    def micro_batches(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield this process's micro-batches of a step."""
        config, runtime = self.t.config, self.t.runtime
        first = step * config.batch_size
        rows = range(first, first + config.batch_size)[runtime.rank :: runtime.world_size]
        size = config.micro_batch_size or len(rows)
        for start in range(0, len(rows), size):
            yield self.t.train.batch(rows[start : start + size])

    def seed_dropout(self, step: int, index: int) -> None:
        """Make the random numbers of a forward pass a function of where it is, so that none need saving."""
        key = f"{self.t.config.seed}/{step}/{index}/{self.t.runtime.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))

    def to_device(self, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Return the arrays as tensors where the model is."""
        return {name: torch.from_numpy(array).to(self.t.runtime.device) for name, array in batch.items()}

    def evaluate(self, max_tokens: int | None) -> Sums:
        """Measure on held-out rows, all of them or evenly spread ones; dropout off, sums exact over processes."""
        config, runtime, source = self.t.config, self.t.runtime, self.t.held_out
        n_rows = source.n_rows
        wanted = n_rows if max_tokens is None else min(n_rows, max(1, max_tokens // config.seq_len))
        rows = [index * n_rows // wanted for index in range(wanted)][runtime.rank :: runtime.world_size]
        size = config.micro_batch_size or config.batch_size
        sums = torch.zeros(4, dtype=torch.float64, device=runtime.device)
        self.module.eval()
        with torch.inference_mode():
            for start in range(0, len(rows), size):
                loss: Loss = self.module(self.to_device(source.batch(rows[start : start + size])))
                sums += torch.stack([loss.sum, loss.count, loss.parts["bytes"], loss.parts["correct"]])
        self.module.train()
        return Sums(*runtime.sum(sums).tolist())

    def check(self) -> None:
        """Evaluate, show samples, save, and remember the best step."""
        state = self.state
        figures = self.evaluate(self.t.config.eval_tokens).figures()
        self.log("eval", {"step": state.step, **figures})
        self.t.progress.say(f"step {state.step}: held out {brief(figures)}")
        if state.best_loss is None or figures["loss"] <= state.best_loss:
            state.best_loss, state.best_step = figures["loss"], state.step
        self.show_samples()
        self.save()

    def show_samples(self) -> None:
        """Let the model write, so that a person sees it learn."""
        if self.t.sample is None or not self.t.runtime.is_main:
            return
        samples = self.t.sample()
        MetricsFile(self.t.folder / "samples.jsonl").append({"step": self.state.step, "samples": samples})
        for sample in samples[:1]:
            self.t.progress.say(f"  {sample['prompt']}|{sample['text']}".replace("\n", " "))

    def save(self) -> None:
        """Publish a checkpoint, then delete what rotation allows."""
        if not self.t.runtime.is_main:
            return
        state = asdict(self.state) | {"before": self.before}
        weights = own_tensors(self.t.model)
        optimizer = dict(optim.named_state(self.t.model, self.optimizers))
        checkpoint.save(self.checkpoints, self.state.step, weights, optimizer, state)
        best = self.checkpoints / f"step-{self.state.best_step:08d}"
        checkpoint.rotate(self.checkpoints, self.t.config.keep_checkpoints, best)

    def stop(self, number: int) -> None:
        """Save and end because a signal came."""
        self.save()
        name = signal.Signals(number).name
        raise InterruptedRunError(
            f"stopped by {name} at step {self.state.step} of {self.state.total_steps}, checkpoint saved",
            f"go on with: {self.t.resume_command}",
            number,
        )

    def finish(self) -> Fitted:
        """Take the best weights back if the last ones are not, and measure on all held-out text."""
        kept = self.state.step
        best = self.checkpoints / f"step-{self.state.best_step:08d}"
        if self.state.best_step not in (-1, self.state.step) and best.is_dir():
            load_tensors(self.t.model, checkpoint.load(best).model)
            kept = self.state.best_step
            self.t.progress.say(f"the weights of step {kept} were better on held-out text and are kept")
        after = self.evaluate(None).figures()
        self.log("eval", {"step": self.state.step, **after, "full": True})
        return Fitted(self.before, after, self.state, kept)

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        if self.t.runtime.is_main:
            self.metrics.append({"kind": kind, "seconds": time.monotonic() - self.started, **record})


class Planner:
    """Turns a budget into a number of steps, which the learning rate needs to know before the end.

    Steps and tokens give it at once. A budget of minutes is divided by the measured time of a step: first at step 4,
    then at doubling steps until half the time is used; after that the plan only shrinks, if the machine gets slower.
    """

    RESERVE_FRAC = 0.06
    """Share of the time left for the last evaluation and for writing the model."""

    def __init__(self, training: Training) -> None:
        self.config = training.config
        self.deadline = training.deadline
        self.next_revision = 4
        self.begun: tuple[int, float] = (0, 0.0)

    def begin(self, state: State) -> None:
        """Set the total where it is not known from a checkpoint."""
        self.begun = (state.step, time.monotonic())
        self.next_revision = max(4, state.step + 4)
        if state.total_steps:
            return
        config = self.config
        by_tokens = -(-config.tokens // (config.batch_size * config.seq_len)) if config.tokens else 0
        state.total_steps = config.steps or by_tokens or 10**9

    def revise(self, state: State) -> None:
        """Divide the time that is left by the time that a step takes."""
        if self.deadline is None or state.step < self.next_revision:
            return
        now = time.monotonic()
        n_steps, seconds = state.step - self.begun[0], now - self.begun[1]
        left = (self.deadline - now) - self.RESERVE_FRAC * self.config.minutes * 60
        planned = state.step + max(0, int(left / (seconds / n_steps)))
        is_early = seconds < left
        if is_early or planned < state.total_steps or state.total_steps == 10**9:
            limit = self.config.steps or 10**9
            state.total_steps = max(state.step, min(planned, limit))
        self.next_revision = state.step * 2 if is_early else state.step + max(1, state.step // 20)

    def eval_every(self, state: State) -> int:
        """Return the steps between evaluations."""
        return self.config.eval_every or max(1, -(-state.total_steps // 10))

    def save_every(self, state: State) -> int:
        """Return the steps between checkpoints that no evaluation makes."""
        return self.config.save_every or self.eval_every(state)


@dataclass
class Caught:
    """The first signal that came, 0 if none."""

    number: int = 0


@contextmanager
def watch_signals() -> Iterator[Caught]:
    """Note SIGINT and SIGTERM for the loop to end at the next step; a second one ends at once."""
    caught = Caught()

    def note(number: int, _: FrameType | None) -> None:
        if caught.number:
            raise KeyboardInterrupt
        caught.number = number
        sys.stderr.write("\nfinishing this step and saving; once more stops at once\n")

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with a tied weight once only."""
    seen: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen[id(tensor)] = name
            tensors[name] = tensor.detach()
    return tensors


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory the process has held: the GPU's allocator's, or the resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def brief(figures: Mapping[str, float]) -> str:
    """Return figures as a person reads them."""
    return (
        f"{figures['bits_per_byte']:.3f} bits/byte, loss {figures['loss']:.3f}, "
        f"perplexity {figures['perplexity']:.1f}, {figures['accuracy']:.1%} right"
    )

"""Checkpoints of the loop: save, restore, choose the best one, roll back after divergence, take back the best weights.

The loop decides when; this file knows what belongs into a checkpoint and how to become what one contains.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.config import TrainConfig
from llmctl.distributed.runtime import Runtime, describe_environment, differences
from llmctl.distributed.sharding import fill, local, own_parts
from llmctl.errors import ArtifactError, DivergedError, OutputError
from llmctl.metrics.figures import is_higher_better
from llmctl.runs import checkpoint
from llmctl.runs.journal import Journal
from llmctl.training import optim
from llmctl.training.master_weights import Masters
from llmctl.training.state import State

Best = tuple[float | None, int, int]
"""Value and number of the best step, and the evaluations since."""


class Saver:
    """Saves and restores what one call of `fit` trains.

    holder: the module that is optimized and saved: the model itself, or the float32 master weights of a bfloat16 one.
    keeps_start: the checkpoint of step 0 stays, so that `take_start` can return to it.
    """

    def __init__(
        self,
        store: checkpoint.Store,
        holder: nn.Module,
        masters: Masters | None,
        optimizers: dict[str, torch.optim.Optimizer],
        state: State,
        config: TrainConfig,
        runtime: Runtime,
        journal: Journal,
        recipe: Mapping[str, Any],
        resume_command: str,
        *,
        keeps_start: bool = False,
    ) -> None:
        self.store, self.holder, self.masters, self.optimizers = store, holder, masters, optimizers
        self.state, self.config, self.runtime, self.journal = state, config, runtime, journal
        self.recipe, self.resume_command, self.keeps_start = recipe, resume_command, keeps_start
        self.start = store.folder / checkpoint.name_of(0)
        self.saved_at, self.longest_seconds = time.monotonic(), 0.0
        if runtime.is_main:
            store.sweep()

    # --- restore ----------------------------------------------------------------------------------------------------------

    def restore(self, saved: checkpoint.Checkpoint) -> list[str]:
        """Take over a checkpoint; return what keeps the resumed run from being the same bit for bit."""
        self.load(saved)
        self.state.take(saved.state)
        before = saved.state.get("recipe")
        if settings(before, *BUDGET) != settings(self.recipe, *BUDGET):
            self.state.total_steps = 0
        if settings(before, "metric") != settings(self.recipe, "metric"):  # values of two metrics do not compare
            self.forget_step((None, -1, 0))
        self.journal.started = time.monotonic() - self.state.seconds
        self.store.verified.add(saved.path.name)
        environment = saved.state.get("environment")
        return differences(
            environment if isinstance(environment, dict) else {},
            describe_environment(self.runtime),
            deterministic=self.runtime.parallel.deterministic,
        )

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Take over weights and optimizer state."""
        self.load_weights(saved)
        optim.load_state(self.holder, self.optimizers, saved)

    def load_weights(self, saved: checkpoint.Checkpoint) -> None:
        """Take over the weights.

        Raises: ArtifactError if they belong to another model.
        """
        named = own_tensors(self.holder, frozen=False)
        mismatches = sorted(set(named) ^ set(saved.names("model")))
        if mismatches:
            raise ArtifactError(
                f"checkpoint `{saved.path}` belongs to another model: `{mismatches[0]}`", "resume with its recipe"
            )
        for name, tensor in named.items():
            if saved.shape("model", name) != tuple(tensor.shape):
                raise ArtifactError(
                    f"checkpoint `{saved.path}` belongs to another model: `{name}` is {list(saved.shape('model', name))}, "
                    f"not {list(tensor.shape)}",
                    "resume with its recipe",
                )
            fill(tensor, lambda *rows, name=name: saved.read("model", name, *rows))
        if self.masters:
            self.masters.push()

    # --- save -------------------------------------------------------------------------------------------------------------

    def save_if_good(self) -> bool:
        """Save, unless the last steps were not finite: the weights that they started from may be the cause."""
        return not self.state.bad_steps and self.save()

    def save(self, *, is_needed: bool = False) -> bool:
        """Publish a checkpoint, then delete what rotation allows; tell whether it was written.

        A failed save is a warning, since the next may succeed; one that is needed raises.
        Raises: OutputError, DivergedError if weights are not finite.
        """
        weights = own_tensors(self.holder, frozen=False)
        finite = torch.tensor(float(all(bool(torch.isfinite(local(w)).all()) for w in weights.values())))
        # A sharded weight may be finite in one process only, and all must decide alike.
        if float(self.runtime.sum(finite.to(self.runtime.device))) < self.runtime.world_size:
            raise DivergedError(
                f"training diverged: weights are not finite at step {self.state.step}; they were not saved",
                f"lower optim.lr, then {self.resume_command}",
            )
        begun, rank = time.monotonic(), self.runtime.rank
        optimizer = dict(optim.named_state(self.holder, self.optimizers))
        self.state.trackers = self.journal.tracker_ids()
        extra = {"environment": describe_environment(self.runtime), "recipe": dict(self.recipe)}
        self.saved_at = time.monotonic()
        try:
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
        self.store.rotate(self.config.keep_checkpoints, best, *([self.start] if self.keeps_start else []))
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - begun)
        return True

    # --- the best step ----------------------------------------------------------------------------------------------------

    def note_step(self, metric: str, value: float) -> Best:
        """Compare an evaluated step with the best one so far, and return what was known before."""
        state = self.state
        before = state.best_value, state.best_step, state.checks_since_best
        # [4] The best step is the latest with the best value of the metric; a value that is not a number, such as a
        # correlation with a constant, never is.
        sign = 1 if is_higher_better(metric) else -1
        is_best = state.best_value is None or sign * value >= sign * state.best_value
        if is_best and not math.isnan(value):
            state.best_value, state.best_step, state.checks_since_best = value, state.step, 0
        else:
            state.checks_since_best += 1
        return before

    def forget_step(self, before: Best) -> None:
        """Undo `note_step` for a step without a checkpoint: its weights could not be taken back."""
        self.state.best_value, self.state.best_step, self.state.checks_since_best = before

    # --- go back ----------------------------------------------------------------------------------------------------------

    def roll_back(self) -> None:
        """Return to the last good checkpoint with a smaller learning rate and other data, or give up.

        Raises: DivergedError.
        """
        state, config = self.state, self.config
        what = f"training diverged: {state.bad_steps} steps in a row without a finite loss (step {state.step})"
        if config.on_divergence == "stop" or state.rollbacks >= config.max_rollbacks:
            raise DivergedError(
                what,
                f"lower optim.lr, or --set train.on_divergence=rollback; the last checkpoint is kept in {self.store.folder}",
            )
        saved = self.newest_good()
        failed, skipped_steps, rollbacks = state.step, state.skipped_steps, state.rollbacks
        lr_scale, skipped_batches = state.lr_scale, state.skipped_batches
        self.load(saved)
        state.take(saved.state)
        state.skipped_steps, state.rollbacks = skipped_steps, rollbacks + 1
        state.lr_scale = lr_scale * config.rollback_lr_frac
        # The batches that led here do not come again: the step number goes back, the position in the data does not.
        state.skipped_batches = skipped_batches + failed - state.step
        text = f"{what}; back to step {state.step} with {state.lr_scale:g} of the learning rate"
        self.journal.event("rollback", state.step, text)

    def newest_good(self) -> checkpoint.Checkpoint:
        """Return the newest valid checkpoint from before the non-finite steps, the same in every process.

        Raises: DivergedError if there is none.
        """
        good = (
            path.name
            for path in self.store.published()
            if self.store.is_valid(path) and not checkpoint.open_checkpoint(path).state["bad_steps"]
        )
        name = self.runtime.lead(lambda: next(good, None))
        if name is None:
            raise DivergedError(
                f"training diverged at step {self.state.step}, and there is no checkpoint to go back to",
                "lower optim.lr",
            )
        return checkpoint.open_checkpoint(self.store.folder / name)

    def take_best(self) -> int:
        """Take back the weights of the best step, unless the last one was; return the step whose weights are kept."""
        state = self.state
        best = self.store.folder / checkpoint.name_of(state.best_step)
        has_better = self.runtime.first(state.best_step not in (-1, state.step) and best.is_dir())
        if not has_better:
            return state.step
        self.load_weights(checkpoint.load(best))
        return state.best_step

    def take_start(self) -> bool:
        """Take back the weights from before the first step; tell whether they were there."""
        if not self.runtime.first(self.start.is_dir()):
            return False
        self.load_weights(checkpoint.load(self.start))
        return True


BUDGET = ("steps", "tokens", "epochs", "minutes")
"""The settings that decide the number of steps."""


def settings(recipe: Any, *names: str) -> list[Any]:
    """Return settings of the training loop, of a recipe as it is kept in a checkpoint."""
    train = recipe.get("train") if isinstance(recipe, dict) else {}
    train = train if isinstance(train, dict) else {}
    return [train.get(name) for name in names]


def own_tensors(model: nn.Module, *, frozen: bool = True) -> dict[str, Tensor]:
    """Return the state dict with a tied weight once only; with or without frozen weights, which nothing changes."""
    seen: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and (frozen or tensor.requires_grad):
            seen[id(tensor)] = name
            tensors[name] = tensor.detach()
    return tensors

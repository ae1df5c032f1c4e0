"""Evaluations of a run on held-out rows: how many fit into its budget, and what they are compared by."""

import math
import time
from collections.abc import Callable, Mapping

from torch import nn

from llmctl.errors import UsageError
from llmctl.metrics.figures import FIGURES, is_higher_better
from llmctl.training.budget import Planner
from llmctl.training.held_out import EVAL_ROWS, measure, rows_of, rows_with
from llmctl.training.inputs import Fitted, Training


class Evaluation:
    """Measures the model of one call of `fit`.

    give_way: called between batches, and raises when a signal ends the run. is_exact: whether the weights that are
    evaluated are those that are kept; False with float32 masters of bfloat16 weights.
    """

    def __init__(
        self,
        training: Training,
        module: nn.Module,
        planner: Planner,
        give_way: Callable[[], None],
        *,
        is_fsdp: bool,
        is_exact: bool,
    ) -> None:
        self.t, self.module, self.planner, self.give_way = training, module, planner, give_way
        self.is_fsdp, self.is_exact = is_fsdp, is_exact
        self.config, self.runtime, self.state = training.config, training.runtime, training.state
        self.last: tuple[int, dict[str, float]] = (-1, {})

    def measure(self, max_tokens: int | None) -> dict[str, float]:
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
            self.give_way,
            sharded=self.is_fsdp,
        )
        if self.t.score is not None and not self.is_fsdp:  # a sharded model cannot generate
            metrics |= self.t.score(max_tokens)
        return metrics

    def fit_to_budget(self) -> None:
        """Measure what a held-out row costs, on a few of them, and choose how many to evaluate before and after training."""
        n_all = self.t.held_out.n_rows
        n_rows = min(n_all, EVAL_ROWS * self.runtime.world_size)
        seconds = math.inf
        while True:  # the first time is slower, unless the model is so large that this hardly shows
            begun = time.monotonic()
            self.measure(n_rows * self.config.seq_len)
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

    def ends(self) -> dict[str, float]:
        """Return metrics on all held-out rows, or on as many as fit into a budget of minutes: before and after training."""
        return self.measure(self.state.eval_rows * self.config.seq_len or None)

    @property
    def check_tokens(self) -> int:
        """The held-out tokens of an evaluation during training: no more than before and after it."""
        most = self.state.eval_rows * self.config.seq_len
        return min(self.config.eval_tokens, most) if most else self.config.eval_tokens

    @property
    def n_checked(self) -> int:
        """The held-out rows of an evaluation during training."""
        return rows_of(self.t.held_out.n_rows, self.check_tokens, self.config.seq_len)

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

    def is_diverged(self, after: Mapping[str, float]) -> bool:
        """Return whether the loss is far above both that before the first step and that of a uniform guess."""
        config = self.t.model.config
        uniform = math.log(max(2, config.n_labels or config.vocab_size))
        return not after["loss"] <= 1.5 * max(self.state.before["loss"], uniform)

    def check_metric(self) -> None:
        """Refuse a metric that the run does not measure.

        Raises: UsageError with those it does.
        """
        if self.t.metric not in self.state.before:
            known = ", ".join(f"`{name}`" for name in self.state.before if name in FIGURES)
            raise UsageError(f"`train.metric` `{self.t.metric}` is not measured in this run", f"measured are {known}")

    def known_figures(self, kept: int) -> dict[str, float] | None:
        """Return the figures of the last evaluation if it was of the weights that are kept, and on all rows that count."""
        step, metrics = self.last
        is_same = kept == step == self.state.step and self.n_checked == self.n_ends
        # Generated answers are counted otherwise than rows. Weights in bfloat16 score a little differently from their float32
        # masters: that is worth a second evaluation, but not out of a budget of minutes.
        is_close = self.is_exact or self.planner.is_timed
        return metrics if is_same and is_close and self.t.score is None else None


def measure_only(training: Training, max_tokens: int = 0) -> Fitted:
    """Return the metrics of a model that is not trained, on all held-out rows or on evenly spaced ones of `max_tokens`."""
    objective, held_out, config = training.objective, training.held_out, training.config
    n_all = held_out.n_rows
    n_rows = rows_with(held_out, max_tokens, config.seq_len) if max_tokens else n_all
    if n_rows < n_all:
        training.state.eval_rows = n_rows
        training.progress.say(f"measuring on {n_rows:,} of {n_all:,} held-out rows")
    most = training.state.eval_rows * config.seq_len or None
    metrics = measure(objective, objective, held_out, config, training.runtime, most, lambda: None, sharded=False)
    if training.score:
        metrics |= training.score(most)
    return Fitted({}, metrics, training.state, 0, {})

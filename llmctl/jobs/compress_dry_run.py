"""`llmctl compress --dry-run`: the plans that fit a size, with their predicted costs; nothing is trained or kept."""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmctl.compressing.plans import Plan
from llmctl.compressing.report import frontier
from llmctl.compressing.samples import data_of, make_data
from llmctl.compressing.search import Search
from llmctl.compressing.settings import check, settle
from llmctl.config import CompressConfig, ModelConfig
from llmctl.runs.progress import make_progress
from llmctl.training.task_data import open_task_model, prepare_task


@dataclass(frozen=True)
class Plans:
    """The plans at the size asked for, the best plans at sizes around it, and what that took."""

    shape: ModelConfig
    plans: list[Plan]
    sizes: list[Plan]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the plans for JSON."""
        return {
            "plans": [plan.to_dict() for plan in self.plans],
            "frontier": [plan.to_dict() for plan in self.sizes],
            "seconds": round(self.seconds, 1),
        }

    def render(self) -> str:
        """Return the plans for people, with a bar for each size of the frontier."""
        highest = max((plan.predicted for plan in self.sizes), default=1.0) or 1.0
        bars = [
            f"{plan.n_bytes / 1e6:>10,.2f}  {plan.predicted:>10.4f}  {'#' * max(1, round(40 * plan.predicted / highest))}"
            for plan in self.sizes
        ]
        return "\n".join([*frontier(self.plans, self.shape), "", "sizes around it, without training:", *bars])


def dry_run(config: CompressConfig, *, started: float, quiet: bool = False) -> Plans:
    """Measure a model's sensitivities and return the plans that fit the size.

    Raises: UsageError for settings or data that cannot be used.
    """
    config = settle(config)
    check(config)
    progress = make_progress(quiet=quiet, verbose=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(config, folder / "text", progress.say)
        config = replace(config, data=data_of(config, folder / "text"))
        base = open_task_model(config, Path(config.model))
        corpus = prepare_task(config, base, folder / "data", progress.say)
        search = Search(config, corpus, folder / "parts", progress.say)
        measured = search.measure()
        found = search.plans(measured), search.frontier(measured)
    progress.close()
    return Plans(search.shape, *found, time.monotonic() - started)

"""`llmctl finetune --dry-run`: examine the data as a run would, and train nothing."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.config import FinetuneConfig
from llmctl.errors import UsageError
from llmctl.preparing.examples import prepare_examples
from llmctl.preparing.show_example import show_example
from llmctl.runs.progress import NO_TOTAL_STEPS
from llmctl.training.budget import planned_steps
from llmctl.training.finetune_settings import check, settle
from llmctl.training.task_data import open_task_model


@dataclass(frozen=True)
class Report:
    """What a run would do, and what was found in its data."""

    plan: dict[str, Any]
    findings: dict[str, object]
    lines: list[str]
    example: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report for `--json`."""
        return {**self.plan, "findings": self.findings} | ({"example": self.example} if self.example else {})

    def render(self) -> str:
        """Return the report for people."""
        width = max(map(len, self.plan))
        rows = [f"{name:<{width}}  {'-' if value is None else value}" for name, value in self.plan.items()]
        return "\n".join([*rows, "", *self.lines, *([self.example] if self.example else [])])


def examine(config: FinetuneConfig, *, with_example: bool) -> Report:
    """Read and encode the data, and return what was found.

    Raises: UsageError for data that cannot be used; for findings too, with `data.strict`.
    """
    config = settle(config)
    check(config)
    if config.task == "text":
        raise UsageError("`--dry-run` examines examples, `--task text` has none", "llmctl pretrain --dry-run")
    base = open_task_model(config, Path(config.model))
    with tempfile.TemporaryDirectory() as folder:
        corpus, findings, first = prepare_examples(config, Path(folder), base)
        train = config.train
        steps = planned_steps(train, len(corpus.train))
        plan = {
            "model": config.model,
            "task": config.task,
            "method": config.method,
            "learning rate": config.optim.lr,
            "steps": steps if steps < NO_TOTAL_STEPS else None,
        }
        if train.minutes:
            plan["minutes"] = train.minutes
        example = show_example(base, first, corpus.provenance["task"]) if with_example else ""
    if config.data.strict:
        findings.refuse()
    return Report(plan, findings.to_dict(), findings.lines(), example)

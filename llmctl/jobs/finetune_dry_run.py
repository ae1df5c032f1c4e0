"""`finetune --dry-run`: the data examined as a run would, and nothing trained."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.config import FinetuneConfig
from llmctl.errors import UsageError
from llmctl.jobs.finetune import Finetuning, settle
from llmctl.preparing.examples import prepare_examples
from llmctl.preparing.show_example import show_example


@dataclass(frozen=True)
class Report:
    """What a run would do, and what was found in its data."""

    plan: dict[str, Any]
    findings: dict[str, object]
    lines: list[str]
    example: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON knows it."""
        return {**self.plan, "findings": self.findings} | ({"example": self.example} if self.example else {})

    def render(self) -> str:
        """Return the report for people."""
        width = max(map(len, self.plan))
        rows = [f"{name:<{width}}  {value}" for name, value in self.plan.items()]
        return "\n".join([*rows, "", *self.lines, *([self.example] if self.example else [])])


def examine(config: FinetuneConfig, *, shows_example: bool) -> Report:
    """Read and encode the data, and return what was found.

    Raises: UsageError for data that cannot be used; for findings, if they are to be errors.
    """
    job = Finetuning(settle(config))
    job.check()
    config = job.config
    if config.task == "text":
        raise UsageError("`--dry-run` examines examples, `--task text` has none", "llmctl pretrain --dry-run")
    with tempfile.TemporaryDirectory() as folder:
        corpus, findings, first = prepare_examples(config, Path(folder), job.base)
        train = config.train
        n_rows = len(corpus.train)
        plan = {
            "model": config.model,
            "task": config.task,
            "method": config.method,
            "learning rate": config.optim.lr,
            "steps": train.steps or max(1, -(-int(train.epochs * n_rows) // train.batch_size)),
        }
        example = show_example(job.base, first, corpus.provenance["task"]) if shows_example else ""
    if config.data.strict:
        findings.refuse()
    return Report(plan, findings.to_dict(), findings.lines(), example)

"""The task of a model when none is named: what it was made for, or what its data looks like."""

from collections.abc import Sequence
from typing import Any

from llmctl.config import TaskConfig
from llmctl.data import pairs, sources, tables, text_files
from llmctl.formats.artifact import Artifact
from llmctl.tables.objectives import OBJECTIVES
from llmctl.tables.tasks import TASKS, trained_tasks

LONG_SOURCES = ("document", "article", "dialogue")
"""Columns that tell a summary from a translation."""


def choose_task(config: TaskConfig, artifact: Artifact) -> str:
    """Return the task of a teacher or a model to quantize: the recipe's, the model's own, or that of the data.

    Only encoder-decoders that do not say what they were trained on are judged by their data: the other families can all
    learn from raw text.
    """
    made_for = artifact.provenance.get("objective")
    if config.task != "auto":
        return config.task
    if artifact.config.n_labels:
        return "classify" if artifact.config.head == "text" else "text"
    if made_for in trained_tasks():
        return TASKS[made_for].taught_as or str(made_for)
    if artifact.config.family == "encoder_decoder" and made_for not in OBJECTIVES:
        return seen_task(config.data.paths) or "text"
    return "text"


def seen_task(paths: Sequence[str]) -> str:
    """Return the task that the first row of the data is an example of; empty for plain text, pipes and other tables."""
    if not paths:
        return ""
    if pairs.two_files(paths[0]):
        return "translate"
    name = sources.expand(paths[:1])[0]
    if text_files.is_pipe(name):
        return ""
    if not tables.is_table(name):
        _, line = next(text_files.numbered_lines(name), (0, ""))
        return "translate" if "\t" in line else ""
    _, row = next(iter(tables.read_rows(name)), ("", None))
    return task_of_row(row)


def task_of_row(row: Any) -> str:
    """Return the task whose columns a row has."""
    if not isinstance(row, dict):
        return "translate" if isinstance(row, list) and len(row) == 2 else ""
    names = row.keys()
    for task in ("qa", "summarize", "translate"):
        required = [(name, *role.names) for name, role in TASKS[task].roles.items() if role.required]
        has_all = all(not names.isdisjoint(known) for known in required)
        if has_all and (task != "summarize" or not names.isdisjoint(LONG_SOURCES)):
            return task
    return "translate" if isinstance(row.get("translation"), dict) else ""

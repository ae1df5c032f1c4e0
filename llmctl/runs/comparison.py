"""Models side by side in a report: rows of a table and the gate on a drop."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmctl.metrics.gate import parse_gate

ROWS: tuple[str, ...] = (
    "loss",
    "perplexity",
    "bits_per_byte",
    "accuracy",
    "f1",
    "mcc",
    "spearman",
    "pearson",
    "bleu",
    "rouge_l",
    "token_f1",
    "kl",
    "agreement",
    "overlap",
    "calibration_error",
)
"""Figures in the order of the table."""


@dataclass(frozen=True)
class Report:
    """The record of `report.json`, and which gate was missed."""

    record: dict[str, Any]
    missed: str = ""


def missed(record: Mapping[str, Any], gate: str) -> str:
    """Return what is wrong with the student by the gate, or nothing."""
    if not gate or "loss" not in record["models"]["teacher"]:
        return ""
    metric, sides = record["metric"], record["models"]
    name = metric if metric in sides["teacher"] else "loss"
    teacher, student = sides["teacher"][name], sides["student"][name]
    if parse_gate(gate).holds(name, teacher, student):
        return ""
    return f"{name}: the student has {student:.6g} against {teacher:.6g} of its teacher, a drop of more than {gate}"


def shown(value: Any, form: str) -> str:
    """Return a figure as the table has it."""
    return "" if value is None else format(value, form)


def row(label: str, cells: Mapping[str, str]) -> str:
    """Return one line of the table."""
    return (label.ljust(18) + "".join(cell.rjust(12) for cell in cells.values())).rstrip()

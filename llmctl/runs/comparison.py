"""Comparison reports of teacher and student: table rows and the check of a gate such as `--max-drop`."""

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
"""Metrics in table order."""


@dataclass(frozen=True)
class Report:
    """The content of `report.json`, and the message of a missed gate (empty if met)."""

    record: dict[str, Any]
    missed: str = ""


def missed(record: Mapping[str, Any], gate: str) -> str:
    """Return a message if the student misses the gate, else an empty string."""
    if not gate or "loss" not in record["models"]["teacher"]:
        return ""
    metric, sides = record["metric"], record["models"]
    name = metric if metric in sides["teacher"] else "loss"
    teacher, student = sides["teacher"][name], sides["student"][name]
    if parse_gate(gate).holds(name, teacher, student):
        return ""
    return f"{name}: student {student:.6g}, teacher {teacher:.6g}, which exceeds the allowed drop of {gate}"


def row(label: str, cells: Mapping[str, str]) -> str:
    """Format one table row: the label left-aligned, the cells right-aligned."""
    return (label.ljust(18) + "".join(cell.rjust(12) for cell in cells.values())).rstrip()

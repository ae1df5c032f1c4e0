"""Labels of examples: the problem type, the label names and the encoding as numbers.

Knows how labels are written in tables. Knows no models: label names come from the caller or the data.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmctl.config import Problem
from llmctl.data import sources, text_files
from llmctl.data.examples import Example
from llmctl.errors import UsageError
from llmctl.tables.names import closest

SEPARATOR = "|"
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
INTEGER = re.compile(r"[+-]?\d+", re.ASCII)


@dataclass(frozen=True)
class Labels:
    """The labels of a dataset: the problem type and, except for regression, the label names in order."""

    problem: Problem
    names: tuple[str, ...] = ()

    def encode(self, example: Example) -> int | float | list[float]:
        """Return an example's target: an index (single), a number (regression), or a 0/1 vector (multi).

        Raises: UsageError with the location and value of a label that is missing, not a number, or unknown.
        """
        value = as_label(example.target, example.where, example.column)
        if self.problem == "regression":
            return _number(value, example)
        if self.problem == "single":
            if isinstance(value, list):
                raise UsageError(f"{_place(example)} contains several labels: `{value}`", "give one label per row")
            return self._index(value, example)
        chosen = {self._index(name, example) for name in _several(value)}
        return [float(index in chosen) for index in range(len(self.names))]

    def _index(self, name: str, example: Example) -> int:
        if name in self.names:
            return self.names.index(name)
        named = not all(INTEGER.fullmatch(known) for known in self.names)
        if named and INTEGER.fullmatch(name) and 0 <= int(name) < len(self.names):
            return int(name)  # an index into the names: 3 is the fourth
        close = closest(name, self.names)
        known = ", ".join(f"`{known}`" for known in self.names[:20]) + (" ..." if len(self.names) > 20 else "")
        hint = f"did you mean `{close}`?" if close else "add the label to the names, or remove that row"
        raise UsageError(f"{_place(example)} is `{name[:60]}`, not one of the labels {known}", hint)


def labels_of(examples: Iterable[Example], names: Sequence[str] = (), problem: Problem | None = None) -> Labels:
    """Infer the problem type and the label names.

    Without `problem`: multi-label if any value is a list or contains `|`; regression if any is a fractional number;
    single-label otherwise. Without `names`: the distinct labels, sorted, integers numerically.

    Raises: UsageError with the location of a missing label.
    """
    values = [as_label(example.target, example.where, example.column) for example in examples]
    problem = problem or _problem(values, names)
    if problem == "regression":
        return Labels(problem)
    if names:
        return Labels(problem, tuple(names))
    distinct = {name for value in values for name in (_several(value) if problem == "multi" else _as_list(value))}
    return Labels(problem, tuple(_sorted(distinct)))


def as_label(value: Any, where: str, column: str) -> str | list[str]:
    """Convert a cell to a label or a list of labels; numbers and booleans become text.

    Raises: UsageError with the location of a missing label.
    """
    if isinstance(value, (list, tuple)):
        return [_label_text(item, where, column) for item in value]
    return _label_text(value, where, column)


def read_names(path: str) -> tuple[str, ...]:
    """Read label names, in order, from a file with one per line.

    Raises: NotFoundError for a missing file; UsageError if it is empty or repeats a label.
    """
    sources.expand([path])
    names: list[str] = []
    for number, line in text_files.numbered_lines(path):
        name = line.strip()
        if name in names:
            raise UsageError(f"`{path}` line {number} repeats the label `{name}`", "list each label once")
        if name:
            names.append(name)
    if not names:
        raise UsageError(f"`{path}` contains no labels", "write one label per line")
    return tuple(names)


def _label_text(value: Any, where: str, column: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():  # parquet turns an integer column with missing cells to floats
        return str(int(value))
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    reason = "empty" if value is None or value == "" or isinstance(value, str) else f"`{value!r:.60}`, not a label"
    raise UsageError(f"{where}: column `{column}` is {reason}", "give that row a label, or remove it")


def _place(example: Example) -> str:
    return f"{example.where}: column `{example.column}`"


def _as_list(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


def _several(value: str | list[str]) -> list[str]:
    if isinstance(value, list):
        return value
    return [part.strip() for part in value.split(SEPARATOR) if part.strip()]


def _problem(values: Sequence[str | list[str]], names: Sequence[str]) -> Problem:
    # A known label may itself contain the separator.
    if any(isinstance(value, list) or (SEPARATOR in value and value not in names) for value in values):
        return "multi"
    if not names and any(NUMBER.fullmatch(value) and not float(value).is_integer() for value in map(str, values)):
        return "regression"
    return "single"


def _number(value: str | list[str], example: Example) -> float:
    if isinstance(value, str) and NUMBER.fullmatch(value) and math.isfinite(float(value)):
        return float(value)
    raise UsageError(f"{_place(example)} is `{value}`, not a number", "the other labels are numbers: correct that row")


def _sorted(names: set[str]) -> list[str]:
    if all(INTEGER.fullmatch(name) for name in names):
        return sorted(names, key=int)
    return sorted(names)

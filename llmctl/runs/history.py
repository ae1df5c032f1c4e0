"""What run folders tell: every run with its state and figures, one run in full, two runs side by side.

Reads only, and trusts nothing it reads: a damaged record, missing metrics or lines of a kind not known here are said,
never an error. Imports torch for the validity of checkpoints only.
"""

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmctl.config import TRAINING, PretrainConfig
from llmctl.errors import LlmctlError
from llmctl.formats.safetensors import read_header
from llmctl.metrics.figures import FIGURES
from llmctl.recipe import flatten, keys_of, read_recipe, values_of
from llmctl.runs.folder import NUMBERED, find_run, is_held, is_unfinished, read_record, runs_folder
from llmctl.runs.metrics_file import MetricsFile

NO_TOTAL_STEPS = 10**9
"""What the loop's plan holds until a budget of minutes is divided by the time of a step."""
EXPECTED = ("loss", "perplexity", "bits_per_byte", "accuracy")
"""Figures that a run is expected to have; others are shown where there are any."""


@dataclass(frozen=True)
class History:
    """One run's folder as it stands; nothing is read before it is asked for, and nothing twice."""

    path: Path

    @property
    def number(self) -> str:
        """The shortest name that commands take: the number, or the whole name of a folder that `-o` named."""
        found = NUMBERED.match(self.path.name)
        return found[1] if found else self.path.name or str(self.path)

    @cached_property
    def record(self) -> dict[str, Any]:
        """What run.json holds; nothing where it cannot be read.

        Read again if the run seems to have been killed: it may have ended between the two looks.
        """
        record = read_record(self.path)
        if record.get("status") == "running" and not is_held(self.path):
            record = read_record(self.path)
            if record.get("status") == "running":
                return record | {"status": "stopped"}
        return record

    @property
    def problem(self) -> str:
        """What is wrong with the folder, or an empty string."""
        if self.record:
            return ""
        return "its run.json cannot be read" if (self.path / "run.json").exists() else "it holds no run.json"

    @property
    def status(self) -> str:
        """The record's status; `stopped` is a run whose process has gone without a word."""
        return "damaged" if self.problem else str(self.record.get("status", "unknown"))

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        try:
            return [line for line in MetricsFile(self.path / "metrics.jsonl").read() if isinstance(line, dict)]
        except OSError:
            return []

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of one kind."""
        return [line for line in self.lines if line.get("kind") == kind]

    def last(self, key: str) -> float | None:
        """Return the last number that metrics.jsonl has for a key."""
        return next((found for line in reversed(self.lines) if (found := number(line.get(key))) is not None), None)

    @property
    def config_class(self) -> type:
        """The config of the command that began the run."""
        return TRAINING.get(str(self.record.get("command")), PretrainConfig)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe's values by dotted key; nothing where there is none that can be read."""
        try:
            return dict(flatten(read_recipe(str(self.path / "recipe.yaml")), keys_of(self.config_class)))
        except (LlmctlError, OSError):
            return {}

    @property
    def summary(self) -> dict[str, Any]:
        """What a finished run recorded about its model."""
        return mapping(self.record.get("summary"))

    @cached_property
    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, newest first, valid or not."""
        return sorted((self.path / "checkpoints").glob("step-*"), reverse=True)

    @cached_property
    def saved(self) -> dict[str, Any]:
        """The numbers of the newest checkpoint."""
        if not self.checkpoints:
            return {}
        try:
            return mapping(json.loads((self.checkpoints[0] / "state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    @property
    def n_parameters(self) -> int | None:
        """The model's size, as recorded at the end or as the newest checkpoint's header has it."""
        recorded = number(self.summary.get("n_parameters"))
        if recorded is not None or not self.checkpoints:
            return None if recorded is None else int(recorded)
        try:
            header = read_header(self.checkpoints[0] / "model.safetensors")
        except (LlmctlError, OSError):
            return None
        return sum(math.prod(entry.shape) for entry in header.tensors.values())

    @property
    def step(self) -> int | None:
        """The last step that is known to have been taken."""
        known = map(number, (self.summary.get("steps"), self.saved.get("step"), self.last("step")))
        return max((int(step) for step in known if step is not None), default=None)

    @property
    def total_steps(self) -> int | None:
        """The planned steps; None while a budget of minutes has not been divided yet."""
        for value in (self.summary.get("steps"), self.saved.get("total_steps"), self.recipe.get("train.steps")):
            total = number(value)
            if total and total < NO_TOTAL_STEPS:
                return int(total)
        return None

    @property
    def final(self) -> dict[str, Any]:
        """The figures on held-out text: the finished model's on all of it, else the best evaluation's so far."""
        after = mapping(self.summary.get("after"))
        evaluations = [line for line in self.of_kind("eval") if number(line.get("loss")) is not None]
        best = min(evaluations, key=lambda line: float(line["loss"]), default={})
        found = {name: number((after or best).get(name)) for name in FIGURES}
        return {name: value for name, value in found.items() if value is not None or name in EXPECTED}

    @property
    def metric(self) -> str:
        """The figure that the run is judged by: a task's own, or bits per byte."""
        named = text(self.summary.get("metric")) or "loss"
        return "bits_per_byte" if named == "loss" and self.final["bits_per_byte"] is not None else named

    @property
    def seconds(self) -> float | None:
        """The wall time. The record's is that of the last session, the metrics' that of all but the model's writing."""
        known = map(number, (self.record.get("seconds"), self.last("seconds")))
        return max((seconds for seconds in known if seconds is not None), default=None)

    def row(self) -> dict[str, Any]:
        """Return what a list of runs shows of this one."""
        return {
            "run": str(self.path),
            "number": self.number,
            "status": self.status,
            "objective": text(self.record.get("objective")),
            "n_parameters": self.n_parameters,
            "step": self.step,
            "total_steps": self.total_steps,
            "bits_per_byte": self.final["bits_per_byte"],
            "metric": self.metric,
            "figure": self.final.get(self.metric),
            "begun": text(self.record.get("created")),
            "seconds": self.seconds,
            "size_bytes": disk_bytes(self.path),
            "problem": self.problem or None,
        }

    def changed(self) -> dict[str, Any]:
        """Return the recipe's values that are not the defaults; a key that is not known here has none."""
        default = values_of(self.config_class())
        return {key: value for key, value in self.recipe.items() if key not in default or default[key] != value}

    def resume_command(self, defects: Sequence[str]) -> str | None:
        """Return how to go on with an unfinished run, if it can: with a valid checkpoint or from the start."""
        can = is_unfinished(self.record) and self.status != "running" and (self.path / "recipe.yaml").is_file()
        if not can or (defects and all(defects)):
            return None
        return f"llmctl {self.record.get('command', 'pretrain')} --resume {shlex.quote(str(self.path))}"


def list_runs() -> tuple[list[History], list[str]]:
    """Return the runs of the runs folder, newest last, and the names of what else lies there.

    Folders that `-o` named have no number and come first.
    """
    folder = runs_folder()
    runs, others = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".") or path.is_symlink() or path.name == "LATEST":
            continue
        if path.is_dir() and ((path / "run.json").exists() or NUMBERED.match(path.name)):
            runs.append(History(path))
        else:
            others.append(path.name)

    def place(run: History) -> tuple[int, str]:
        found = NUMBERED.match(run.path.name)
        return (int(found[1]) if found else -1, run.path.name)

    return sorted(runs, key=place), others


def find(name: str) -> History:
    """Return the run that a name means, finished or not.

    Raises: NotFoundError, UsageError as find_run does.
    """
    return History(find_run(name, holding="run.json", finished=True))


def in_full(run: History) -> dict[str, Any]:
    """Return everything there is to say about one run; every checkpoint is read to the end for it."""
    from llmctl.runs.checkpoint import defect

    defects = [defect(path) for path in run.checkpoints]
    return run.row() | {
        "command": text(run.record.get("invocation")),
        "error": text(run.record.get("error")) if run.status == "failed" else None,
        "model": text(run.summary.get("model")),
        "recipe": run.changed(),
        "environment": mapping(run.record.get("environment")),
        "evaluations": run.of_kind("eval"),
        "losses": [line["loss"] for line in run.of_kind("train") if number(line.get("loss")) is not None],
        "events": run.of_kind("event"),
        "checkpoints": [
            {"checkpoint": str(path), "size_bytes": disk_bytes(path), "defect": problem or None}
            for path, problem in zip(run.checkpoints, defects, strict=True)
        ],
        "resume": run.resume_command(defects),
        "missing": [name for name in ("run.json", "recipe.yaml", "metrics.jsonl") if not (run.path / name).is_file()],
    }


def compare(a: History, b: History) -> dict[str, Any]:
    """Return in what two runs differ: recipe, environment, and the final figures with b - a."""
    recipe = differing(a.recipe, b.recipe, values_of(b.config_class())) if a.recipe and b.recipe else None
    here, there = mapping(a.record.get("environment")), mapping(b.record.get("environment"))
    return {
        "a": str(a.path),
        "b": str(b.path),
        "recipe": recipe,
        "environment": differing(here, there, {}) if here and there else None,
        "figures": {name: beside(x, y) for (name, x), y in zip(outcome(a).items(), outcome(b).values(), strict=True)},
        "held_out_differs": held_out_differs(recipe or {}),
    }


def held_out_differs(recipe: Mapping[str, Any]) -> list[str]:
    """Return the differing keys that choose what is predicted, and from which text; figures then compare little."""
    choosing = ("objective", "train.seed")  # the seed draws the held-out documents and what is masked
    return [key for key in recipe if key in choosing or key.startswith("data.")]


def outcome(run: History) -> dict[str, float | None]:
    """Return the figures by which runs are compared."""
    return {
        "n_parameters": run.n_parameters,
        "steps": run.step,
        "tokens": number(run.summary.get("tokens")) or run.last("tokens"),
        "seconds": run.seconds,
        "size_bytes": disk_bytes(run.path),
        **run.final,
    }


def beside(a: float | None, b: float | None) -> dict[str, float | None]:
    """Return two figures and their difference, if there are two."""
    return {"a": a, "b": b, "difference": None if a is None or b is None else b - a}


def differing(a: Mapping[str, Any], b: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return both values of the keys that differ; what one leaves out has its default there."""
    pairs = {key: [side.get(key, default.get(key)) for side in (a, b)] for key in {**a, **b}}
    return {key: values for key, values in pairs.items() if values[0] != values[1]}


def spread(values: Sequence[float], n: int) -> list[float]:
    """Return `n` means over equal parts of a long course, or a short one as it is."""
    if len(values) <= n:
        return list(values)
    bounds = [index * len(values) // n for index in range(n + 1)]
    return [math.fsum(values[begin:end]) / (end - begin) for begin, end in pairwise(bounds)]


def disk_bytes(folder: Path) -> int:
    """Return the bytes of a folder's files; what vanishes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118 - a Path per file is slow
    return total


def number(value: Any) -> float | None:
    """Return the value if it is a finite number; what was written by another hand may hold anything."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def text(value: Any) -> str | None:
    """Return the value if it is a string."""
    return value if isinstance(value, str) else None


def mapping(value: Any) -> dict[str, Any]:
    """Return the value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}

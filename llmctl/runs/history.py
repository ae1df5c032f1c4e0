"""Read-only views of run folders: the list of runs, one run in detail, two runs compared.

Trusts nothing it reads: a damaged record, missing metrics and lines of unknown kinds are reported, never an error.
Imports torch only to validate checkpoints.
"""

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
from llmctl.files import parse_json
from llmctl.formats.safetensors import read_header
from llmctl.metrics.figures import FIGURES
from llmctl.recipe import flatten, keys_of, read_recipe, values_of
from llmctl.runs.folder import NUMBERED, find_run, is_held, is_unfinished, read_record, run_paths, runs_folder
from llmctl.runs.metrics_file import MetricsFile
from llmctl.runs.progress import NO_TOTAL_STEPS

LARGEST = 1e300
"""Of the numbers that are believed; JSON can hold integers that are no float."""
EXPECTED = ("loss", "perplexity", "bits_per_byte", "accuracy")
"""Metrics reported for every run, as null if missing; others are reported only if present."""


@dataclass(frozen=True)
class History:
    """A snapshot of one run folder; each file is read lazily and once."""

    path: Path

    @property
    def number(self) -> str:
        """The shortest name that commands accept: the number, or the full name of a folder made with `-o`."""
        match = NUMBERED.match(self.path.name)
        return match[1] if match else self.path.name or str(self.path)

    @cached_property
    def record(self) -> dict[str, Any]:
        """The content of `run.json`, empty if unreadable; a `running` record without a live process is `stopped`.

        It is read a second time before that: the run may have finished between reading and checking the lock.
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
        return "its run.json cannot be read" if (self.path / "run.json").exists() else "it has no run.json"

    @property
    def status(self) -> str:
        """The record's status; `stopped` means that the process died without recording an end."""
        return "damaged" if self.problem else str(self.record.get("status", "unknown"))

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl."""
        try:
            return [line for line in MetricsFile(self.path / "metrics.jsonl").read() if isinstance(line, dict)]
        except OSError:
            return []

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of one kind: `train`, `eval` or `event`."""
        return [line for line in self.lines if line.get("kind") == kind]

    def last(self, key: str) -> float | None:
        """Return the last number under a key in metrics.jsonl."""
        return next((value for line in reversed(self.lines) if (value := number(line.get(key))) is not None), None)

    @property
    def config_class(self) -> type:
        """The config class of the command that started the run."""
        return TRAINING.get(str(self.record.get("command")), PretrainConfig)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe's values by dotted key, empty if the recipe is missing or unreadable."""
        try:
            return dict(flatten(read_recipe(str(self.path / "recipe.yaml")), keys_of(self.config_class)))
        except (LlmctlError, OSError):
            return {}

    @property
    def summary(self) -> dict[str, Any]:
        """The summary that a finished run recorded about its model."""
        return mapping(self.record.get("summary"))

    @cached_property
    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, newest first, valid or not."""
        return sorted((self.path / "checkpoints").glob("step-*"), reverse=True)

    @cached_property
    def saved(self) -> dict[str, Any]:
        """The training state in the newest checkpoint, empty if unreadable."""
        if not self.checkpoints:
            return {}
        try:
            return mapping(parse_json((self.checkpoints[0] / "state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    @property
    def n_parameters(self) -> int | None:
        """The parameter count: recorded at the end, or from the header of the newest checkpoint's weights."""
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
        """The last step known to be complete, from the record, the newest checkpoint or the metrics."""
        # Metrics run ahead of checkpoints, and a finished run's summary is authoritative: the largest is right.
        known = map(number, (self.summary.get("steps"), self.saved.get("step"), self.last("step")))
        return max((int(step) for step in known if step is not None), default=None)

    @property
    def total_steps(self) -> int | None:
        """The planned steps; None while a budget in minutes has not yet been converted to steps."""
        for value in (self.summary.get("steps"), self.saved.get("total_steps"), self.recipe.get("train.steps")):
            total = number(value)
            if total and total < NO_TOTAL_STEPS:
                return int(total)
        return None

    @property
    def final(self) -> dict[str, Any]:
        """The held-out metrics: of the finished model on all held-out text, else of the best evaluation so far."""
        after = mapping(self.summary.get("after"))
        evaluations = [line for line in self.of_kind("eval") if number(line.get("loss")) is not None]
        best = min(evaluations, key=lambda line: float(line["loss"]), default={})
        values = {name: number((after or best).get(name)) for name in FIGURES}
        return {name: value for name, value in values.items() if value is not None or name in EXPECTED}

    @property
    def metric(self) -> str:
        """The run's main metric: the task's own, or bits per byte."""
        named = text(self.summary.get("metric")) or "loss"
        return "bits_per_byte" if named == "loss" and self.final["bits_per_byte"] is not None else named

    @property
    def seconds(self) -> float | None:
        """The wall time: the larger of the record's (last session only) and the metrics' (all training, no export)."""
        known = map(number, (self.record.get("seconds"), self.last("seconds")))
        return max((seconds for seconds in known if seconds is not None), default=None)

    def row(self) -> dict[str, Any]:
        """Return this run's row in the list of runs."""
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
        """Return the recipe's values that differ from the defaults; unknown keys are included."""
        default = values_of(self.config_class())
        return {key: value for key, value in self.recipe.items() if key not in default or default[key] != value}

    def resume_command(self, defects: Sequence[str]) -> str | None:
        """Return the command that resumes an unfinished run, or None.

        defects: of each checkpoint, empty if valid. A run without any checkpoint restarts from step 0.
        """
        has_recipe = (self.path / "recipe.yaml").is_file()
        can_resume = is_unfinished(self.record) and self.status != "running" and has_recipe
        if not can_resume or (defects and all(defects)):
            return None
        return f"llmctl {self.record.get('command', 'pretrain')} --resume {shlex.quote(str(self.path))}"


def list_runs() -> tuple[list[History], list[str]]:
    """Return the runs in the runs folder, newest last, and the names of other files in it.

    Folders made with `-o`, there or elsewhere, have no number and come first.
    """
    folder, paths = runs_folder(), run_paths()
    rest = sorted(set(folder.iterdir()) - set(paths)) if folder.is_dir() else []
    # `latest` and `LATEST` only point to runs.
    others = [
        path.name for path in rest if not (path.name.startswith(".") or path.is_symlink() or path.name == "LATEST")
    ]

    def sort_key(run: History) -> tuple[int, str]:
        match = NUMBERED.match(run.path.name)
        return (int(match[1]) if match else -1, run.path.name)

    return sorted(map(History, paths), key=sort_key), others


def find(name: str) -> History:
    """Resolve a run name, finished or not.

    Raises: NotFoundError, UsageError as find_run does.
    """
    return History(find_run(name, holding="run.json", finished=True))


def in_full(run: History) -> dict[str, Any]:
    """Return all details of one run; this reads every checkpoint completely to verify its digests."""
    from llmctl.runs.checkpoint import defect

    defects = [defect(path) for path in run.checkpoints]
    # Quantizing without training takes no step.
    is_untrained = run.status == "finished" and number(run.summary.get("steps")) == 0
    expected = ("run.json", "recipe.yaml", *(() if is_untrained else ("metrics.jsonl",)))
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
        "missing": [name for name in expected if not (run.path / name).is_file()],
        "report": mapping(mapping(run.summary.get("report")).get("models")),
    }


def compare(a: History, b: History) -> dict[str, Any]:
    """Return the differences of two runs: recipe, environment, and the final metrics with b - a."""
    recipe = differing(a.recipe, b.recipe, values_of(b.config_class())) if a.recipe and b.recipe else None
    environment_a, environment_b = mapping(a.record.get("environment")), mapping(b.record.get("environment"))
    return {
        "a": str(a.path),
        "b": str(b.path),
        "recipe": recipe,
        "environment": differing(environment_a, environment_b, {}) if environment_a and environment_b else None,
        "figures": {name: paired(x, y) for (name, x), y in zip(outcome(a).items(), outcome(b).values(), strict=True)},
        "held_out_differs": held_out_differs(recipe or {}),
    }


def held_out_differs(recipe: Mapping[str, Any]) -> list[str]:
    """Return the differing keys that change the held-out text or the objective: metrics are then not comparable."""
    other_keys = ("objective", "train.seed")  # the seed selects the held-out documents and the masked tokens
    return [key for key in recipe if key in other_keys or key.startswith("data.")]


def outcome(run: History) -> dict[str, float | None]:
    """Return the metrics in which runs are compared."""
    return {
        "n_parameters": run.n_parameters,
        "steps": run.step,
        "tokens": number(run.summary.get("tokens")) or run.last("tokens"),
        "seconds": run.seconds,
        "size_bytes": disk_bytes(run.path),
        **run.final,
    }


def paired(a: float | None, b: float | None) -> dict[str, float | None]:
    """Return two values and their difference, None if either is missing."""
    return {"a": a, "b": b, "difference": None if a is None or b is None else b - a}


def differing(a: Mapping[str, Any], b: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return both values of the keys that differ; a missing key has its default."""
    pairs = {key: [side.get(key, default.get(key)) for side in (a, b)] for key in {**a, **b}}
    return {key: values for key, values in pairs.items() if values[0] != values[1]}


def spread(values: Sequence[float], n: int) -> list[float]:
    """Downsample a sequence to at most `n` values: means over `n` nearly equal parts."""
    if len(values) <= n:
        return list(values)
    bounds = [index * len(values) // n for index in range(n + 1)]
    return [math.fsum(values[begin:end]) / (end - begin) for begin, end in pairwise(bounds)]


def disk_bytes(folder: Path) -> int:
    """Return the total size of a folder's files in bytes; files deleted meanwhile are skipped."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118 - a Path per file is slow
    return total


def number(value: Any) -> float | None:
    """Return the value if it is a finite number, else None; a file edited by hand may contain anything."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) <= LARGEST else None


def text(value: Any) -> str | None:
    """Return the value if it is a string, else None."""
    return value if isinstance(value, str) else None


def mapping(value: Any) -> dict[str, Any]:
    """Return the value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}

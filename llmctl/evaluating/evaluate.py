"""Evaluate models on a task, one after the other on the same data, and compare them with the first.

tables/tasks.py lists the tasks; each kind is measured in its own file.
"""

import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from llmctl.artifacts.find import OTHERS, a_model, kind_of, needs_data
from llmctl.artifacts.hub import shown
from llmctl.artifacts.load import Loaded, choose_device, is_bare, load_model
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import EvaluateConfig
from llmctl.data.builtin import builtin_documents
from llmctl.data.examples import Example, read_examples
from llmctl.data.sources import expand, read_documents
from llmctl.data.text_files import Blank, is_pipe
from llmctl.errors import GateError, UsageError
from llmctl.evaluating.answers import evaluate_answers  # noqa: F401
from llmctl.evaluating.choices import evaluate_choice, evaluate_lastword  # noqa: F401 - named in the table
from llmctl.evaluating.labels import evaluate_classify, evaluate_similarity  # noqa: F401
from llmctl.evaluating.result import Measured
from llmctl.evaluating.text import evaluate_mask, evaluate_text  # noqa: F401
from llmctl.evaluating.token_heads import evaluate_entities, evaluate_spans  # noqa: F401
from llmctl.formats.artifact import Artifact
from llmctl.formats.transformers_backend import TransformersArtifact
from llmctl.inference.encoding import longest_row, require_tokenizer
from llmctl.machine import forget_peak_memory, give_back_memory, peak_since_forgotten
from llmctl.metrics.figures import is_higher_better, rounded
from llmctl.metrics.gate import Gate
from llmctl.runs.progress import Say
from llmctl.tables.heads import HEADS
from llmctl.tables.tasks import TASKS, Task

Measure = Callable[[Loaded, Any, EvaluateConfig], Measured]


def supports(task: Task, artifact: Artifact) -> bool:
    """Return whether a task applies to a model of this family and head."""
    model = artifact.config
    if model.n_labels and model.head != "text":
        return task.extracts == model.head
    has_head = (task.head == "labels") == bool(model.n_labels) and task.head != "none" and not is_bare(artifact)
    return model.family in task.measures and (task.head == "any" or has_head)


@dataclass(frozen=True)
class Evaluation:
    """Metrics and cost of one model; `peak_memory_bytes` is None if the system does not report it."""

    model: str
    task: str
    metric: str
    measured: Measured
    n_parameters: int
    size_bytes: int
    peak_memory_bytes: int | None
    seconds: float

    @property
    def main(self) -> float:
        """The metric that models are compared by."""
        return self.measured.figures.get(self.metric, math.nan)

    def record(self) -> dict[str, Any]:
        """Return the record that `--json` prints."""
        measured = self.measured
        return {
            "model": self.model,
            "task": self.task,
            "figures": rounded(measured.figures),
            "n_rows": measured.n_rows,
            "n_empty": measured.n_empty,
            "n_cut": measured.n_cut,
            "n_parameters": self.n_parameters,
            "size_bytes": self.size_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "tokens_per_second": rounded({"rate": measured.n_tokens / max(self.seconds, 1e-9)})["rate"],
            "seconds": round(self.seconds, 3),
            **({"example": measured.example} if measured.example else {}),
        }


def default_task(artifact: Artifact) -> str:
    """Return the task of a model if none is given."""
    model = artifact.config
    if model.n_labels:
        return HEADS[model.head].task
    if is_bare(artifact):
        return "similarity"
    return {"decoder": "text", "encoder": "mask", "encoder_decoder": "translate"}[model.family]


def evaluate(paths: Sequence[Path], config: EvaluateConfig, say: Say) -> Iterator[Evaluation]:
    """Yield the evaluation of every model in order, after checking all of them before the first is loaded.

    Raises: UsageError for settings out of range, data that does not fit the task, or a model that the task does not
        apply to; NotFoundError and ArtifactError for models and data.
    """
    check(config)
    choose_device(config.device)
    models = {path: read_model(path, config.backend) for path in paths}
    if config.task == "auto":
        config = replace(config, task=default_task(models[paths[0]]))
        say(f"task: {config.task} (default of `{shown(paths[0])}`; --task chooses another)")
    for path, model in models.items():
        require_supported(config.task, model, path)
    metric = chosen_metric(config)
    if TASKS[config.task].reads != "text" and not config.data:
        raise needs_data(paths[0], models[paths[0]].config, config.task)
    data = read_data(config, say)
    for path in paths:
        yield evaluate_one(path, data, replace(config, metric=metric), say)


def check(config: EvaluateConfig) -> None:
    """Refuse settings outside their range.

    Raises: UsageError listing all of them.
    """
    checks = [
        (config.limit < 0, f"`--limit` is {config.limit}, it must be 0 (all) or more"),
        (config.batch_size < 1, f"`--batch-size` is {config.batch_size}, it must be at least 1"),
        (config.seq_len < 0, f"`--seq-len` is {config.seq_len}, it must be 0 (the context) or more"),
        (config.stride < 0, f"`--stride` is {config.stride}, it must be 0 (the window length) or more"),
        (config.beams < 1, f"`--beams` is {config.beams}, it must be at least 1"),
        (config.max_tokens < 1, f"`--max-tokens` is {config.max_tokens}, it must be at least 1"),
        (config.seed < 0, f"`seed` is {config.seed}, it must be 0 or more"),
        (not 0 < config.mask_frac <= 1, f"`mask_frac` is {config.mask_frac}, it must be in (0, 1]"),
    ]
    problems = [sentence for wrong, sentence in checks if wrong]
    if problems:
        raise UsageError("; ".join(problems), "`llmctl evaluate --help` lists the options")


def require_supported(task: str, artifact: Artifact, path: Path) -> None:
    """Refuse a model that cannot be measured on a task.

    Raises: UsageError naming the tasks that apply to it.
    """
    if supports(TASKS[task], artifact):
        return
    able = ", ".join(name for name, row in TASKS.items() if supports(row, artifact))
    model = artifact.config
    head = " with a classification head" if model.n_labels else ""
    head = " without a classification head" if task == "classify" and not head else head
    kind = a_model(model.family) + (" without a prediction head" if is_bare(artifact) else head)
    if model.head != "text":
        kind = kind_of(model)
    trains = f"`llmctl finetune {shlex.quote(str(path))} DATA --task classify`"
    more = f"{trains} trains a classifier; " if task == "classify" and model.head == "text" else ""
    raise UsageError(
        f"`{path}` is {kind}, which cannot be measured on `{task}`", f"{more}use `--task` {able}; {OTHERS}"
    )


def chosen_metric(config: EvaluateConfig) -> str:
    """Return the metric that models are compared by; empty: the first metric that the task returns."""
    metrics = TASKS[config.task].metrics
    if config.metric and config.metric not in metrics:
        raise UsageError(
            f"`--task {config.task}` has no metric `{config.metric}`",
            f"`--metric` takes {', '.join(metrics)}",
        )
    return config.metric


@dataclass(frozen=True)
class Texts:
    """Texts that can be iterated several times without keeping them in memory."""

    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.read()


def read_data(config: EvaluateConfig, say: Say) -> Texts | list[Example]:
    """Return the data of a task: texts, or labeled examples.

    Raises: UsageError and NotFoundError from reading.
    """
    if TASKS[config.task].reads == "text":
        return read_texts(config, say)
    return list(islice(read_examples(config.data, config.task, config.columns), config.limit or None))


def read_texts(config: EvaluateConfig, say: Say) -> Texts:
    """Return the texts of `text` and `mask`; the content of pipes is kept, as it can be read only once."""
    if not config.data:
        say("data: the built-in corpus, which `llmctl pretrain` trains on by default; -d names other text")
        return Texts(lambda: iter(builtin_documents()))
    key, said = config.columns.text or "text", list[str]()

    def read() -> Iterator[str]:
        blank = Blank()
        yield from read_documents(config.data, text_key=key, split=config.split, blank=blank)
        for line in blank.lines("documents"):
            if line not in said:  # the texts are read once for every model
                said.append(line)
                say(line)

    if any(map(is_pipe, expand(config.data))):
        kept = list(read())
        return Texts(lambda: iter(kept))
    return Texts(read)


def evaluate_one(path: Path, data: Texts | list[Example], config: EvaluateConfig, say: Say) -> Evaluation:
    """Load, measure and release one model."""
    give_back_memory()
    device = torch.device(choose_device(config.device))
    has_peak = forget_peak_memory(device)
    loaded = load_model(path, device=config.device, dtype=config.dtype, packed=True, backend=config.backend)
    if isinstance(loaded.artifact, TransformersArtifact):
        say(f"{path}: {loaded.artifact.architecture}, run by transformers")
    require_tokenizer(loaded)
    longest_row(loaded, config.seq_len)
    task = TASKS[config.task]
    extracts = loaded.artifact.config.n_labels > 0 and loaded.artifact.config.head == task.extracts
    measure: Measure = globals()[task.extractor if extracts else task.evaluator]
    begun = time.perf_counter()
    measured = measure(loaded, data, config)
    seconds = time.perf_counter() - begun
    for count, what in ((measured.n_cut, "longer than the context and were truncated"), (measured.n_empty, "empty")):
        if count:
            say(f"{shown(path)}: {count:,} of {measured.n_rows:,} inputs are {what}")
    metric = config.metric or next(name for name in TASKS[config.task].metrics if name in measured.figures)
    return Evaluation(
        model=shown(path),
        task=config.task,
        metric=metric,
        measured=measured,
        n_parameters=loaded.model.n_parameters,
        size_bytes=sum(file.stat().st_size for file in {file for file, _, _ in loaded.artifact.tensors.values()}),
        peak_memory_bytes=peak_since_forgotten(device) if has_peak else None,
        seconds=seconds,
    )


def tokenizers_differ(paths: Sequence[Path], backend: str = "native") -> bool:
    """Return whether tokenizers differ, so that metrics per token cannot be compared."""
    from llmctl.tokenizer.load import find_tokenizer

    tokenizers = [find_tokenizer(read_model(path, backend).files) for path in paths]
    return len({tokenizer.sha256 for tokenizer in tokenizers if tokenizer is not None}) > 1


# --- the gate --------------------------------------------------------------------------------------------------------


def check_gate(evaluations: Sequence[Evaluation], gate: Gate) -> None:
    """Compare the other models with the first.

    Raises: GateError naming every model that is worse by more than the gate allows, or whose metric is not finite.
    """
    first, metric = evaluations[0], evaluations[0].metric
    missed = [
        f"`{other.model}` has {other.main:.6g}"
        for other in evaluations[1:]
        if not gate.holds(metric, first.main, other.main)
    ]
    if missed:
        better = "more" if is_higher_better(metric) else "less"
        raise GateError(
            f"{metric}: {', '.join(missed)} against {first.main:.6g} of `{first.model}`, "
            f"a drop of more than {gate.text} ({better} is better)",
            "raise `--max-drop` to accept it",
        )

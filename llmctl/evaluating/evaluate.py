"""Evaluate models on a task, one after the other on the same data, and compare them with the first.

The table EVALUATORS lists the tasks; each is measured in its own file.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from llmctl.artifacts.find import a_model
from llmctl.artifacts.load import Loaded, choose_device, load_model
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import EvaluateConfig, Family, ModelConfig
from llmctl.data.builtin import builtin_documents
from llmctl.data.examples import TASKS, Example, read_examples
from llmctl.data.sources import expand, read_documents
from llmctl.data.text_files import is_pipe
from llmctl.errors import GateError, UsageError
from llmctl.evaluating.answers import METRICS, evaluate_answers
from llmctl.evaluating.choices import evaluate_choice, evaluate_lastword
from llmctl.evaluating.labels import evaluate_classify, evaluate_similarity
from llmctl.evaluating.result import Measured
from llmctl.evaluating.text import evaluate_mask, evaluate_text
from llmctl.inference.encoding import longest_row, require_tokenizer
from llmctl.machine import forget_peak_memory, give_back_memory, peak_since_forgotten
from llmctl.metrics.figures import is_higher_better, rounded
from llmctl.metrics.gate import Gate
from llmctl.runs.progress import Say

EVERY: tuple[Family, ...] = ("decoder", "encoder", "encoder_decoder")


@dataclass(frozen=True)
class Evaluator:
    """A task: its metrics, main one first; the model families and heads it applies to; and its source."""

    figures: tuple[str, ...]
    families: tuple[Family, ...]
    measure: Callable[[Loaded, Any, EvaluateConfig], Measured]
    source: str
    head: Literal["words", "labels", "any"] = "words"

    def supports(self, model: ModelConfig) -> bool:
        """Return whether the task applies to a model of this family and head."""
        fits = self.head == "any" or (self.head == "labels") == bool(model.n_labels)
        return model.family in self.families and fits


GENERATORS: tuple[Family, ...] = ("decoder", "encoder_decoder")
EVALUATORS: dict[str, Evaluator] = {
    "text": Evaluator(
        ("perplexity", "bits_per_byte", "loss", "accuracy"),
        ("decoder",),
        evaluate_text,
        "transformers' guide to the perplexity of models of fixed length",
    ),
    "mask": Evaluator(
        ("accuracy", "loss", "perplexity", "bits_per_byte"),
        ("encoder",),
        evaluate_mask,
        "BERT, Devlin et al. 2019, arXiv:1810.04805",
    ),
    "classify": Evaluator(
        ("accuracy", "f1", "mcc", "spearman", "pearson", "loss"),
        EVERY,
        evaluate_classify,
        "GLUE, Wang et al. 2018, arXiv:1804.07461",
        "labels",
    ),
    "similarity": Evaluator(
        ("spearman", "pearson"), EVERY, evaluate_similarity, "STS benchmark, Cer et al. 2017, arXiv:1708.00055", "any"
    ),
    "translate": Evaluator(
        (*METRICS["translate"], "loss", "perplexity"),
        GENERATORS,
        partial(evaluate_answers, task="translate"),
        "BLEU, Post 2018, arXiv:1804.08771; chrF, Popovic 2015",
    ),
    "summarize": Evaluator(
        (*METRICS["summarize"], "loss", "perplexity"),
        GENERATORS,
        partial(evaluate_answers, task="summarize"),
        "ROUGE-L, Lin 2004; chrF, Popovic 2015",
    ),
    "qa": Evaluator(
        (*METRICS["qa"], "loss", "perplexity"),
        GENERATORS,
        partial(evaluate_answers, task="qa"),
        "SQuAD, Rajpurkar et al. 2016, arXiv:1606.05250",
    ),
    "choice": Evaluator(
        ("accuracy", "accuracy_norm"),
        GENERATORS,
        evaluate_choice,
        "PIQA, arXiv:1911.11641; HellaSwag, arXiv:1905.07830",
    ),
    "lastword": Evaluator(
        ("accuracy", "perplexity", "loss"),
        GENERATORS,
        evaluate_lastword,
        "LAMBADA, Paperno et al. 2016, arXiv:1606.06031",
    ),
}
TEXT_TASKS = ("text", "mask")


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


def default_task(model: ModelConfig) -> str:
    """Return the task of a model if none is given."""
    if model.n_labels:
        return "classify"
    return {"decoder": "text", "encoder": "mask", "encoder_decoder": "translate"}[model.family]


def evaluate(paths: Sequence[Path], config: EvaluateConfig, say: Say) -> Iterator[Evaluation]:
    """Yield the evaluation of every model in order, after checking all of them before the first is loaded.

    Raises: UsageError for settings out of range, data that does not fit the task, or a model that the task does not
        apply to; NotFoundError and ArtifactError for models and data.
    """
    check(config)
    choose_device(config.device)
    models = {path: read_model(path).config for path in paths}
    if config.task == "auto":
        config = replace(config, task=default_task(models[paths[0]]))  # type: ignore[arg-type]
        say(f"task: {config.task} (default of `{paths[0]}`; --task chooses another)")
    evaluator = EVALUATORS[config.task]
    for path, model in models.items():
        require_supported(evaluator, config.task, model, path)
    metric = chosen_metric(evaluator, config)
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


def require_supported(evaluator: Evaluator, task: str, model: ModelConfig, path: Path) -> None:
    """Refuse a model that cannot be measured on a task.

    Raises: UsageError naming the tasks that apply to it.
    """
    if evaluator.supports(model):
        return
    able = ", ".join(name for name, row in EVALUATORS.items() if row.supports(model))
    kind = a_model(model.family) + (" with a classification head" if model.n_labels else "")
    more = "`llmctl finetune --task classify` trains a classifier; " if task == "classify" else ""
    raise UsageError(f"`{path}` is {kind}, which cannot be measured on `{task}`", f"{more}use `--task` {able}")


def chosen_metric(evaluator: Evaluator, config: EvaluateConfig) -> str:
    """Return the metric that models are compared by; empty: the first metric that the task returns."""
    if config.metric and config.metric not in evaluator.figures:
        raise UsageError(
            f"`--task {config.task}` has no metric `{config.metric}`",
            f"`--metric` takes {', '.join(evaluator.figures)}",
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

    Raises: UsageError and NotFoundError from reading; UsageError if a task that needs a table gets no data.
    """
    if config.task in TEXT_TASKS:
        return read_texts(config, say)
    if not config.data:
        roles = ", ".join(name for name, role in TASKS[config.task].items() if role.required)
        raise UsageError(f"`--task {config.task}` needs data", f"`-d FILE` names a table with {roles or 'its rows'}")
    return list(islice(read_examples(config.data, config.task, config.columns), config.limit or None))


def read_texts(config: EvaluateConfig, say: Say) -> Texts:
    """Return the texts of `text` and `mask`; the content of pipes is kept, as it can be read only once."""
    if not config.data:
        say("data: the built-in corpus, which `llmctl pretrain` trains on by default; -d names other text")
        return Texts(lambda: iter(builtin_documents()))
    key = config.columns.text or "text"

    def read() -> Iterator[str]:
        return read_documents(config.data, text_key=key, split=config.split)

    if any(map(is_pipe, expand(config.data))):
        kept = list(read())
        return Texts(lambda: iter(kept))
    return Texts(read)


def evaluate_one(path: Path, data: Texts | list[Example], config: EvaluateConfig, say: Say) -> Evaluation:
    """Load, measure and release one model."""
    give_back_memory()
    device = torch.device(choose_device(config.device))
    has_peak = forget_peak_memory(device)
    loaded = load_model(path, device=config.device, dtype=config.dtype, packed=True)
    require_tokenizer(loaded)
    longest_row(loaded, config.seq_len)
    evaluator, begun = EVALUATORS[config.task], time.perf_counter()
    measured = evaluator.measure(loaded, data, config)
    seconds = time.perf_counter() - begun
    for count, what in ((measured.n_cut, "longer than the context and were truncated"), (measured.n_empty, "empty")):
        if count:
            say(f"{path}: {count:,} of {measured.n_rows:,} inputs are {what}")
    metric = config.metric or next(name for name in evaluator.figures if name in measured.figures)
    return Evaluation(
        model=str(path),
        task=config.task,
        metric=metric,
        measured=measured,
        n_parameters=loaded.model.n_parameters,
        size_bytes=sum(file.stat().st_size for file in {file for file, _, _ in loaded.artifact.tensors.values()}),
        peak_memory_bytes=peak_since_forgotten(device) if has_peak else None,
        seconds=seconds,
    )


def tokenizers_differ(paths: Sequence[Path]) -> bool:
    """Return whether tokenizers differ, so that metrics per token cannot be compared."""
    from llmctl.tokenizer.load import find_tokenizer

    tokenizers = [find_tokenizer(read_model(path).files) for path in paths]
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

"""The data of a job on an existing model: raw text as in pretraining, or the examples of a task.

Knows how rows become batches and how generated answers are scored; knows nothing of what is trained on them.
"""

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.artifacts.find import a_model, kind_of
from llmctl.artifacts.load import Loaded, fitting_tokenizer, without_weights
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import FinetuneConfig, ModelChoice, ModelConfig, PretrainConfig, TaskConfig
from llmctl.data.batches import AnswerBatches, ClassBatches, Ids, Ints, PairBatches
from llmctl.data.labels import Labels
from llmctl.data.preference_batches import SLOTS, PreferenceBatches
from llmctl.data.stream import ExampleRows, PackedExamples, PairRows
from llmctl.distributed.runtime import Runtime
from llmctl.errors import UsageError
from llmctl.formats.generation_settings import with_end_ids
from llmctl.inference.chat_ids import end_of_turn_ids
from llmctl.model.flops import Rows
from llmctl.model.transformer import LanguageModel
from llmctl.preparing.corpus import Corpus, prepare_corpus
from llmctl.preparing.examples import chat_of, prepare_examples
from llmctl.preparing.show_example import show_example as example_lines
from llmctl.runs.progress import Say
from llmctl.tables.objectives import OBJECTIVES, TEXT_OBJECTIVES
from llmctl.tables.preferences import PREFERENCES
from llmctl.tables.tasks import TASKS
from llmctl.training.batch import BatchSource, to_device
from llmctl.training.batches import make_batches, rows_of
from llmctl.training.generation_scores import Score, make_sampler, make_score
from llmctl.training.samples import Sampler
from llmctl.training.settings import check_corpus

PROBLEM_METRICS = {"single": "accuracy", "multi": "f1", "regression": "spearman"}
"""The metric by which the best step is chosen, by the kind of labels."""

CALIBRATION_BATCH_ROWS = 8

FEWEST_PACKED_STEPS = 8
"""With fewer steps in an epoch than this, packing leaves a model too few of them to learn from."""


def check_task(config: TaskConfig, base: Loaded) -> None:
    """Refuse a task that a model cannot be trained on.

    Raises: UsageError naming both.
    """
    family, task = base.model.config.family, config.task
    if base.tokenizer is None:
        raise UsageError(f"`{config.model}` has no tokenizer", "import the model with its tokenizer files")
    if family not in TASKS[task].trains:
        fitting = " or ".join(name for name, row in TASKS.items() if family in row.trains)
        raise UsageError(
            f"`{config.model}` is {a_model(family)}, which cannot be trained on `--task {task}`",
            f"--task {fitting}, or another model",
        )
    head = base.model.config.head if base.model.config.n_labels else ""
    # The encoder under a head over tokens is measured on plain text, by its states.
    if head and (head, task) not in (("text", "classify"), ("tokens", "text"), ("span", "text")):
        what = "has a classification head" if head == "text" else f"is {kind_of(base.model.config)}"
        raise UsageError(
            f"`{config.model}` {what}, `--task {task}` needs a language modeling head",
            f"--task {'classify' if head == 'text' else 'text'}, or the model it was made from",
        )
    needs = OBJECTIVES[text_config(config, base).objective].needs if task == "text" else ""
    if needs == "sentinels" and not base.tokenizer.sentinel_ids():
        raise UsageError(
            f"`{config.model}` has no <extra_id_0>, ... tokens, which raw text needs for {a_model(family)}",
            "pass pairs as data and `--task` translate, summarize or qa",
        )
    if needs == "mask" and base.tokenizer.mask_id is None:
        raise UsageError(
            f"`{config.model}` has no mask token, which `--task text` needs", "--task classify, or another model"
        )


def text_config(config: TaskConfig, base: Loaded) -> PretrainConfig:
    """Return the pretraining that `task: text` is: on what the model says it was pretrained on, or its family is."""
    family = base.model.config.family
    objective = base.artifact.provenance.get("objective")
    if objective not in OBJECTIVES or family not in OBJECTIVES[objective].families:
        objective = TEXT_OBJECTIVES[family]
    return PretrainConfig(
        objective=objective,
        model=ModelChoice(config.model),
        data=config.data,
        optim=config.optim,
        train=config.train,
        parallel=config.parallel,
    )


def prepare_task(
    config: TaskConfig,
    base: Loaded,
    folder: Path,
    say: Say,
    *,
    show_example: bool = False,
    other: Loaded | None = None,
) -> Corpus:
    """Read, examine, split and encode text or examples; other: see `prepare_examples`.

    Raises: UsageError where findings are to be errors; whatever the readers raise.
    """
    if config.task == "text":
        problems: list[str] = []

        def tell(line: str) -> None:
            if line.startswith("data: "):
                problems.append(line.removeprefix("data: "))
            say(line)

        corpus = prepare_corpus(text_config(config, base), folder, base.tokenizer, tell)
        if config.data.strict and problems:
            raise UsageError("; ".join(problems), "fix the data, or omit `--strict`")
        return corpus
    corpus, findings, first = prepare_examples(config, folder, base, other)
    for line in findings.lines():
        say(line)
    if show_example:
        say(example_lines(base, first, corpus.provenance["task"]))
    if config.data.strict:
        findings.refuse()
    corpus.provenance["findings"] = findings.to_dict()
    return corpus


def open_task_model(config: TaskConfig, path: Path, backend: str = "native") -> Loaded:
    """Return the model that data is encoded for, without its weights; see `read_model` for the backend.

    Raises: UsageError for a model without a tokenizer, or one that cannot do the task.
    """
    artifact = read_model(path, backend)
    loaded = Loaded(without_weights(artifact.config), fitting_tokenizer(artifact), artifact)
    check_task(config, loaded)
    return loaded


def labels_of_corpus(corpus: Corpus) -> Labels:
    """Return the labels of the data (classify)."""
    task = corpus.provenance["task"]
    return Labels(task["problem"], tuple(task["labels"]))


def metric_of(config: TaskConfig, corpus: Corpus, say: Say) -> str:
    """Return the metric by which the best step is chosen: the recipe's, or the task's own."""
    if config.train.metric:
        return config.train.metric
    if config.task == "classify":
        return PROBLEM_METRICS[labels_of_corpus(corpus).problem]
    metric = TASKS[config.task].metric
    if metric == "bleu" and find_spec("sacrebleu") is None:
        say("the best step is chosen by the loss: BLEU needs sacrebleu (pip install sacrebleu)")
        return "loss"
    return metric


@dataclass(frozen=True)
class TaskData:
    """Encoded data and the model it was encoded for; `model` arguments are the shapes that train on it."""

    config: TaskConfig
    base: Loaded
    corpus: Corpus
    metric: str
    reference: NDArray[np.float64] | None = None
    """prefer: the log probabilities of all answers before training, where the model has no adapters to switch off."""

    @classmethod
    def open(cls, config: TaskConfig, base: Loaded, corpus: Corpus, say: Say) -> "TaskData":
        """Check that there is enough to learn from, and choose the metric.

        Raises: UsageError for text that is too short.
        """
        data = cls(config, base, corpus, metric_of(config, corpus, say))
        if data.text is not None:
            check_corpus(data.text, corpus)
        return data

    @cached_property
    def text(self) -> PretrainConfig | None:
        """The pretraining that `task: text` is; None for tasks with examples."""
        return text_config(self.config, self.base) if self.config.task == "text" else None

    def rows(self, model: ModelConfig) -> Rows:
        """Return the rows of a step, as full as they can be."""
        if self.text is not None:
            return rows_of(self.text, model)
        train = self.config.train
        if self.config.task == "prefer":  # both answers of a preference
            return Rows(train.batch_size, SLOTS * train.seq_len, 0, packed=True)
        is_pair = model.family == "encoder_decoder"
        return Rows(train.batch_size, train.seq_len, train.seq_len if is_pair else 0, packed=True)

    def batches(self, model: ModelConfig, *, shuffle: bool, fixed: bool = False) -> BatchSource:
        """Return the batches of the training or the held-out part.

        fixed: cut and mask text once instead of anew in every epoch; examples always stay what they are.
        """
        if self.text is not None:
            return make_batches(self.text, self.corpus, model, shuffle=shuffle, fixed=fixed)
        config, corpus, train = self.config, self.corpus, self.config.train
        selection = corpus.train if shuffle else corpus.held_out
        ids = self.ids(model)
        options: dict[str, Any] = {"seed": train.seed, "shuffle": shuffle}
        lengths = corpus.documents.lengths
        # A pair's first length places token types; models without them need none.
        if config.task == "classify":
            first_lengths = corpus.arrays["first_lengths"] if model.n_token_types > 1 else None
            order = ExampleRows(lengths, selection, batch_size=train.batch_size, **options)
            return ClassBatches(corpus.documents, corpus.arrays["values"], first_lengths, order, ids)
        assert corpus.targets is not None
        if config.task == "prefer":
            return self.preferences(model, selection, shuffle=shuffle)
        if model.family == "encoder_decoder":
            pairs = PairRows(corpus.documents, corpus.targets, selection, batch_size=train.batch_size, **options)
            return PairBatches(pairs, ids, train.seq_len)
        # Training and held-out rows are laid out alike, by the amount of training data.
        n_steps = int((lengths[corpus.train] - 1).sum()) / (train.seq_len * train.batch_size)
        rows: PackedExamples | ExampleRows
        if config.data.pack == "always" or (config.data.pack == "auto" and n_steps >= FEWEST_PACKED_STEPS):
            rows = PackedExamples(lengths - 1, selection, seq_len=train.seq_len, **options)
        else:
            rows = ExampleRows(lengths, selection, batch_size=train.batch_size, **options)
        return AnswerBatches(corpus.documents, corpus.targets, rows, ids, train.seq_len)

    @property
    def parts(self) -> tuple[Ints, Ints]:
        """The indexes of the training and of the held-out examples."""
        return self.corpus.train, self.corpus.held_out

    def preferences(self, model: ModelConfig, selection: Ints, *, shuffle: bool) -> PreferenceBatches:
        """Return batches of preferences; the answers of one are in the same row."""
        config, corpus = self.config, self.corpus
        assert isinstance(config, FinetuneConfig)
        assert corpus.targets is not None
        row, lengths, train = PREFERENCES[config.preference.loss], corpus.documents.lengths, config.train
        order = ExampleRows(lengths, selection, batch_size=train.batch_size, seed=train.seed, shuffle=shuffle)
        mismatched = None
        if not row.is_paired:
            mismatched = np.zeros(len(lengths), dtype=np.int64)
            mismatched[selection] = np.roll(selection, -1)
        return PreferenceBatches(
            corpus.documents,
            corpus.targets,
            corpus.arrays["first_lengths"],
            corpus.arrays["values"][:, 0] == 1,
            order,
            self.ids(model),
            counts_answers=not row.is_paired,
            mismatched=mismatched,
            reference=self.reference,
        )

    def ids(self, model: ModelConfig) -> Ids:
        """Return the special ids that batches are built with."""
        return Ids(
            pad=max(model.pad_id, 0),
            eos=max(model.eos_id, 0),
            decoder_start=max(model.decoder_start_id, 0),
            special=self.corpus.tokenizer.token_bytes() == 0,
            source_end=self.base.frame.after,
        )

    def some_batches(self, model: ModelConfig, n_rows: int) -> list[dict[str, Tensor]]:
        """Return training batches of `n_rows` rows in all, on the CPU: to rank or calibrate the parts of a model on."""
        source = self.batches(model, shuffle=True)
        rows = min(n_rows, source.n_rows)
        size, cpu = min(CALIBRATION_BATCH_ROWS, rows), torch.device("cpu")
        return [to_device(source.batch(range(first, min(first + size, rows))), cpu) for first in range(0, rows, size)]

    def sampler(self, model: LanguageModel) -> Sampler | None:
        """Return what answers a few held-out examples; None for models that generate no text."""
        if model.config.n_labels:
            return None
        return make_sampler(Loaded(model, self.corpus.tokenizer, self.base.artifact), self.corpus)

    def score(self, model: LanguageModel, runtime: Runtime) -> Score | None:
        """Return what scores generated answers to held-out examples; None where the metric needs none."""
        loaded = Loaded(model, self.corpus.tokenizer, self.base.artifact)
        return make_score(loaded, self.corpus, self.metric, self.config.train.seq_len, runtime)

    def files(self) -> dict[str, bytes]:
        """Return what has to lie next to a model trained on this: the base's files with the corpus's tokenizer."""
        files = {**self.base.artifact.files, **self.corpus.tokenizer.files()}
        if not TASKS[self.config.task].is_chat:
            return files
        # Answers are trained to end with the template's end of turn, which other programs know only from these files.
        return with_end_ids(self.base.model.config, files, sorted(end_of_turn_ids(chat_of(self.base))))

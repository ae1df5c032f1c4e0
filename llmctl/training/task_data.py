"""The data half of a job on a model that is there: raw text as it was pretrained on, or the examples of a task."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmctl.artifacts.load import Loaded
from llmctl.config import ModelChoice, ModelConfig, PretrainConfig, TaskConfig
from llmctl.data.batches import AnswerBatches, ClassBatches, Ids, PairBatches
from llmctl.data.labels import Labels
from llmctl.data.stream import ExampleRows, PackedExamples, PairRows
from llmctl.errors import UsageError
from llmctl.model.flops import Rows
from llmctl.preparing.corpus import Corpus, prepare_corpus
from llmctl.preparing.examples import prepare_examples
from llmctl.preparing.show_example import show_example
from llmctl.runs.progress import Say
from llmctl.training.batch import BatchSource
from llmctl.training.batches import make_batches, rows_of
from llmctl.training.objectives import OBJECTIVES
from llmctl.training.settings import check_corpus

TEXT_OBJECTIVES = {"decoder": "clm", "encoder": "mlm", "encoder_decoder": "span"}
"""What `task: text` trains a family on, where a model does not say what it was pretrained on."""

METRICS = {"translate": "bleu", "summarize": "rouge_l", "qa": "token_f1"}
PROBLEM_METRICS = {"single": "accuracy", "multi": "f1", "regression": "spearman"}
"""A task's own figure, by which the best step is chosen; of the others the loss."""

FEWEST_PACKED_STEPS = 8
"""With fewer steps in an epoch than this, packing leaves a model too few of them to learn from."""


def check_task(config: TaskConfig, base: Loaded) -> None:
    """Refuse a task that a model cannot be trained on.

    Raises: UsageError naming both.
    """
    family, task = base.model.config.family, config.task
    if base.tokenizer is None:
        raise UsageError(f"`{config.model}` has no tokenizer", "import the model with its tokenizer files")
    if family == "encoder" and task not in ("classify", "text"):
        raise UsageError(
            f"`{config.model}` is an encoder, which writes no text, as `--task {task}` asks",
            "--task classify, or a decoder or an encoder-decoder",
        )
    if family == "encoder_decoder" and task == "chat":
        raise UsageError(
            f"`{config.model}` is an encoder-decoder, `--task chat` is for decoders",
            "--task qa, translate or summarize maps one text to another",
        )
    if base.model.config.n_labels and task != "classify":
        raise UsageError(
            f"`{config.model}` has a classification head, `--task {task}` needs one over the vocabulary",
            "--task classify, or the model it was made from",
        )


def text_config(config: TaskConfig, base: Loaded) -> PretrainConfig:
    """Return the pretraining that `task: text` is: on what the model says it was pretrained on, or its family is."""
    family = base.model.config.family
    objective = base.artifact.provenance.get("objective")
    if objective not in OBJECTIVES or family not in OBJECTIVES[objective].families:
        objective = TEXT_OBJECTIVES[family]
    return PretrainConfig(
        objective=objective,  # type: ignore[arg-type]
        model=ModelChoice(config.model),
        data=config.data,
        optim=config.optim,
        train=config.train,
        parallel=config.parallel,
    )


def prepare_task(config: TaskConfig, base: Loaded, folder: Path, say: Say, *, shows_example: bool = False) -> Corpus:
    """Read, examine, split and encode text or examples.

    Raises: UsageError where findings are to be errors; whatever the readers raise.
    """
    if config.task == "text":
        return prepare_corpus(text_config(config, base), folder, base.tokenizer, say)
    corpus, findings, first = prepare_examples(config, folder, base)
    for line in findings.lines():
        say(line)
    if shows_example:
        say(show_example(base, first, corpus.provenance["task"]))
    if config.data.strict:
        findings.refuse()
    corpus.provenance["findings"] = findings.to_dict()
    return corpus


def check_task_corpus(config: TaskConfig, base: Loaded, corpus: Corpus) -> None:
    """Refuse text that is too short to learn from."""
    if config.task == "text":
        check_corpus(text_config(config, base), corpus)


def labels_of_corpus(corpus: Corpus) -> Labels:
    """Return the labels of the data (classify)."""
    task = corpus.provenance["task"]
    return Labels(task["problem"], tuple(task["labels"]))


def metric_of(config: TaskConfig, corpus: Corpus, say: Say) -> str:
    """Return the figure by which the best step is chosen."""
    if config.task == "classify":
        return PROBLEM_METRICS[labels_of_corpus(corpus).problem]
    metric = METRICS.get(config.task, "loss")
    if metric == "bleu" and find_spec("sacrebleu") is None:
        say("the best step is chosen by the loss: BLEU needs sacrebleu (pip install 'llmctl[eval]')")
        return "loss"
    return metric


def task_rows(config: TaskConfig, base: Loaded, model: ModelConfig) -> Rows:
    """Return the rows of a step, as full as they can be."""
    if config.task == "text":
        return rows_of(text_config(config, base), model)
    train = config.train
    is_pair = model.family == "encoder_decoder"
    return Rows(train.batch_size, train.seq_len, train.seq_len if is_pair else 0, packed=True)


def task_batches(
    config: TaskConfig, base: Loaded, corpus: Corpus, model: ModelConfig, *, shuffle: bool, fixed: bool = False
) -> BatchSource:
    """Return the batches of the training or the held-out part; examples are `fixed` as they are, text may be."""
    if config.task == "text":
        return make_batches(text_config(config, base), corpus, model, shuffle=shuffle, fixed=fixed)
    train = config.train
    selection = corpus.train if shuffle else corpus.held_out
    ids = Ids(
        pad=max(model.pad_id, 0),
        eos=max(model.eos_id, 0),
        decoder_start=max(model.decoder_start_id, 0),
        special=corpus.tokenizer.token_bytes() == 0,
    )
    options: dict[str, Any] = {"seed": train.seed, "shuffle": shuffle}
    lengths = corpus.documents.lengths
    if config.task == "classify":
        first_lengths = corpus.arrays["first_lengths"] if model.n_token_types else None
        order = ExampleRows(lengths, selection, batch_size=train.batch_size, **options)
        return ClassBatches(corpus.documents, corpus.arrays["values"], first_lengths, order, ids)
    assert corpus.targets is not None
    if model.family == "encoder_decoder":
        pairs = PairRows(corpus.documents, corpus.targets, selection, batch_size=train.batch_size, **options)
        return PairBatches(pairs, ids, train.seq_len)
    # Training and held-out rows are laid out alike, by what there is to train on.
    n_steps = int((lengths[corpus.train] - 1).sum()) / (train.seq_len * train.batch_size)
    rows: PackedExamples | ExampleRows
    if config.data.pack == "always" or (config.data.pack == "auto" and n_steps >= FEWEST_PACKED_STEPS):
        rows = PackedExamples(lengths - 1, selection, seq_len=train.seq_len, **options)
    else:
        rows = ExampleRows(lengths, selection, batch_size=train.batch_size, **options)
    return AnswerBatches(corpus.documents, corpus.targets, rows, ids, train.seq_len)

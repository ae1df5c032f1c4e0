"""Tasks: what models are fine-tuned and evaluated on. To add one: a row here, and new functions only where it names them.

Roles are what a task reads from the columns of a table; templates turn them into a prompt.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Role(NamedTuple):
    """What a task reads from one column, and the common names of that column besides the role's own, best match first."""

    names: tuple[str, ...]
    required: bool = True


PAIRED_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("question", "sentence"),
    ("question", "passage"),
)
TEXTS = ("sentence", "review", "content", "title", *dict.fromkeys(first for first, _ in PAIRED_COLUMNS))
SECONDS = ("sentence2", "hypothesis", "question2", "text2", "text_b", "text_pair")
LABELS = ("labels", "class", "category", "score", "stars", "rating", "sentiment", "intent", "target")
SOURCES = ("src", "input", "document", "article", "dialogue")
TARGETS = ("tgt", "output", "summary", "highlights")
QUESTIONS = ("query", "prompt")
ANSWERS = ("label", "answerKey", "gold", "target")

EVERY = ("decoder", "encoder", "encoder_decoder")
GENERATORS = ("decoder", "encoder_decoder")


@dataclass(frozen=True)
class Task:
    """A task.

    trains, measures: model families that `finetune` and `evaluate` accept. head: what a model must predict: `tokens`,
    `labels`, `any`, or nothing else than what `extracts` says: the `model.head` over tokens that is measured on it too, by
    the function `extractor`. reads: `text` (documents), `conversations`, or `table`. make: the function of data/examples.py that
    makes an example of a row. is_pairs: rows are source and target texts, which may also be tab-separated lines or two
    parallel files. evaluator: the function of evaluating/evaluate.py. metrics: of the evaluation, the main one first; metric:
    by which training chooses the best step. generated: metrics of generated texts. template, source_template: the prompt of
    a decoder, the source of an encoder-decoder. stops: strings that end a decoder's answer. taught_as: the task that
    students and quantized models of a model trained on this one are trained on, if it is another.
    """

    summary: str
    trains: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    head: str = "tokens"
    reads: str = "table"
    roles: Mapping[str, Role] = field(default_factory=dict)
    make: str = "plain_example"
    is_pairs: bool = False
    evaluator: str = ""
    metrics: tuple[str, ...] = ()
    generated: tuple[str, ...] = ()
    metric: str = "loss"
    template: str = ""
    source_template: str = ""
    stops: tuple[str, ...] = ()
    source: str = ""
    extracts: str = ""
    extractor: str = ""
    taught_as: str = ""

    @property
    def is_chat(self) -> bool:
        """Whether a decoder learns to answer messages, by its chat template."""
        return self.reads in ("conversations", "preferences")


TASKS: dict[str, Task] = {
    "chat": Task("conversations, loss on the assistant's turns", trains=("decoder",), reads="conversations"),
    "prefer": Task(
        "preferences between answers (DPO and others)",
        trains=("decoder",),
        reads="preferences",
        roles={"chosen": Role(()), "rejected": Role(())},
        source="DPO, Rafailov et al. 2023, arXiv:2305.18290",
        taught_as="chat",
    ),
    "text": Task(
        "raw text as in pretraining",
        trains=EVERY,
        measures=("decoder",),
        reads="text",
        evaluator="evaluate_text",
        metrics=("perplexity", "bits_per_byte", "loss", "accuracy"),
        source="transformers' guide to the perplexity of models of fixed length",
    ),
    "mask": Task(
        "masked tokens of raw text",
        measures=("encoder",),
        reads="text",
        evaluator="evaluate_mask",
        metrics=("accuracy", "loss", "perplexity", "bits_per_byte"),
        source="BERT, Devlin et al. 2019, arXiv:1810.04805",
    ),
    "classify": Task(
        "labels or numbers of texts",
        trains=EVERY,
        measures=EVERY,
        head="labels",
        roles={"text": Role(TEXTS), "pair": Role(SECONDS, required=False), "label": Role(LABELS)},
        evaluator="evaluate_classify",
        metrics=("accuracy", "f1", "mcc", "spearman", "pearson", "loss"),
        metric="accuracy",
        source="GLUE, Wang et al. 2018, arXiv:1804.07461",
    ),
    "similarity": Task(
        "similarity of sentence pairs (STS)",
        measures=EVERY,
        head="any",
        roles={"text": Role(TEXTS), "pair": Role(SECONDS), "label": Role(("score", "similarity", *LABELS))},
        evaluator="evaluate_similarity",
        metrics=("spearman", "pearson"),
        source="STS benchmark, Cer et al. 2017, arXiv:1708.00055",
    ),
    "translate": Task(
        "translation",
        trains=GENERATORS,
        measures=GENERATORS,
        roles={"source": Role(SOURCES), "target": Role(TARGETS)},
        make="pair_example",
        is_pairs=True,
        evaluator="evaluate_answers",
        metrics=("bleu", "chrf", "loss", "perplexity"),
        generated=("bleu", "chrf"),
        metric="bleu",
        template="{source}\nTranslation:",
        source_template="{source}",
        stops=("\n",),
        source="BLEU, Post 2018, arXiv:1804.08771; chrF, Popovic 2015",
    ),
    "summarize": Task(
        "summarization",
        trains=GENERATORS,
        measures=GENERATORS,
        roles={"source": Role(("document", "article", "dialogue", *SOURCES)), "target": Role(TARGETS)},
        make="pair_example",
        is_pairs=True,
        evaluator="evaluate_answers",
        metrics=("rouge_l", "chrf", "loss", "perplexity"),
        generated=("rouge_l", "chrf"),
        metric="rouge_l",
        template="{source}\nTL;DR:",  # Radford et al. 2019 (GPT-2), section 3.6
        source_template="{source}",
        stops=("\n\n",),
        source="ROUGE-L, Lin 2004; chrF, Popovic 2015",
    ),
    "qa": Task(
        "question answering over a context",
        trains=GENERATORS,
        measures=GENERATORS,
        roles={
            "question": Role(QUESTIONS),
            "context": Role(("passage",), required=False),
            "answer": Role(("answers", "target")),
        },
        make="question_example",
        evaluator="evaluate_answers",
        metrics=("exact_match", "token_f1", "loss", "perplexity"),
        generated=("exact_match", "token_f1"),
        metric="token_f1",
        template="{context}\nQuestion: {question}\nAnswer:",
        # Raffel et al. 2020 (T5), arXiv:1910.10683, appendix D
        source_template="question: {question} context: {context}",
        stops=("\n",),
        source="SQuAD, Rajpurkar et al. 2016, arXiv:1606.05250",
        extracts="span",
        extractor="evaluate_spans",
    ),
    "tokens": Task(
        "entities of tagged words",
        measures=("encoder",),
        head="none",
        roles={"tokens": Role(("words",)), "tags": Role(("ner_tags", "labels"))},
        make="tagged_example",
        metrics=("f1", "precision", "recall", "accuracy"),
        source="CoNLL 2003, Tjong Kim Sang & De Meulder, cs/0306050",
        extracts="tokens",
        extractor="evaluate_entities",
    ),
    "choice": Task(
        "multiple choice by likelihood",
        measures=GENERATORS,
        roles={
            "question": Role(("goal", *QUESTIONS), required=False),
            "context": Role(("ctx", "passage"), required=False),
            "answer": Role(ANSWERS, required=False),  # PIQA keeps the answers in a separate file
        },
        make="choice_example",
        evaluator="evaluate_choice",
        metrics=("accuracy", "accuracy_norm"),
        template="{context}\nQuestion: {question}\nAnswer:",
        source_template="question: {question} context: {context}",
        source="PIQA, arXiv:1911.11641; HellaSwag, arXiv:1905.07830",
    ),
    "lastword": Task(
        "last word of a passage",
        measures=GENERATORS,
        roles={"text": Role(TEXTS)},
        evaluator="evaluate_lastword",
        metrics=("accuracy", "perplexity", "loss"),
        source="LAMBADA, Paperno et al. 2016, arXiv:1606.06031",
    ),
}


def trained_tasks() -> tuple[str, ...]:
    """Return the tasks of `finetune`."""
    return tuple(name for name, task in TASKS.items() if task.trains)


def taught_tasks() -> tuple[str, ...]:
    """Return the tasks of `distill`, `quantize` and `compress`."""
    return tuple(name for name in trained_tasks() if not TASKS[name].taught_as)


def measured_tasks() -> tuple[str, ...]:
    """Return the tasks of `evaluate`."""
    return tuple(name for name, task in TASKS.items() if task.measures)


def fitting_tasks(columns: Collection[str]) -> tuple[str, ...]:
    """Return the tasks that models are trained on whose required roles all have a column with a common name."""
    found = []
    for task, row in TASKS.items():
        taken: list[str] = []
        for name, role in row.roles.items():
            if role.required:
                usual = (name, *role.names)
                taken += [next((c for c in usual if c in columns and c not in taken), "")]
        if row.trains and taken and all(taken):
            found.append(task)
    return tuple(found)


def or_task(tasks: Collection[str]) -> str:
    """Return a hint's beginning that names the tasks which the columns of the data fit; empty if none does."""
    return f"these columns fit `--task {'` or `'.join(tasks)}`; " if tasks else ""

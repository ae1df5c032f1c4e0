"""Published classifiers: the families' own bodies with the head that transformers gives each of them.

A classifier is the family's table with other rows for the head, so that a body is described once. What no published
class expresses (another pooling, Marian) is written in the native format.
"""

from dataclasses import dataclass, replace
from typing import Any

from llmctl.config import ModelConfig
from llmctl.formats.families.bart import BART
from llmctl.formats.families.bert import BERT, BERT_BARE
from llmctl.formats.families.family import FamilyFormat
from llmctl.formats.families.gpt2 import GPT2
from llmctl.formats.families.llama import EUROBERT, LLAMA, QWEN3
from llmctl.formats.families.parameters import Tensors, module, prefixed
from llmctl.formats.families.published import Published
from llmctl.formats.families.rows import Row, converted, fixed
from llmctl.formats.families.t5 import T5

PROBLEMS = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
POOLINGS = {"mean": "mean", "first": "bos"}
"""Our pooling -> EuroBERT's `classifier_pooling`; its third kind, `late`, averages outputs."""


@dataclass(frozen=True)
class Head:
    """How a published class names the parts of its head, and what it does to a hidden state before.

    prefix: what the class puts before the names of the body. pooling: a choice, or the row of the key that names it.
    """

    classifier: str
    dense: str = ""
    pooling: str | Row = "last"
    activation: str = "none"
    prefix: str = ""


def numbered(n_labels: int) -> tuple[str, ...]:
    """Return the names that transformers gives outputs without names."""
    return tuple(f"LABEL_{number}" for number in range(n_labels))


def read_labels(published: Published, _: ModelConfig) -> dict[str, Any]:
    """Read number, names and kind of the outputs."""
    names = published.values.get("id2label") or dict(zip("01", numbered(2), strict=True))
    # Any order of the keys, but no gap: the number of an output is its row in the weight.
    if not isinstance(names, dict) or sorted(names, key=str) != sorted(map(str, range(len(names)))):
        raise published.refuse("id2label", names, "names of the outputs by number from 0")
    labels = tuple(str(names[str(number)]) for number in range(len(names)))
    # transformers' own rule for files without the key.
    default = "regression" if len(labels) == 1 else PROBLEMS["single"]
    kind = published.values.get("problem_type") or default
    problem = next((own for own, name in PROBLEMS.items() if name == kind), None)
    if problem is None:
        raise published.refuse("problem_type", kind, ", ".join(PROBLEMS.values()))
    return {
        "n_labels": len(labels),
        "labels": () if labels == numbered(len(labels)) else labels,
        "problem": problem,
    }


def write_labels(config: ModelConfig) -> dict[str, Any]:
    """Write number, names and kind of the outputs."""
    labels = config.labels or numbered(config.n_labels)
    return {
        "id2label": {str(number): name for number, name in enumerate(labels)},
        "label2id": {name: number for number, name in enumerate(labels)},
        "problem_type": PROBLEMS.get(config.problem),
    }


def classifier(base: FamilyFormat, architecture: str, head: Head) -> FamilyFormat:
    """Return a family's published classifier; the head over the vocabulary and what tells of it are gone."""
    pooling = head.pooling if isinstance(head.pooling, Row) else fixed(pooling=head.pooling)
    tensors: Tensors = module(head.classifier, "classifier")
    if head.dense:
        tensors = (*module(head.dense, "classifier_dense"), *tensors)
    return replace(
        base,
        architecture=architecture,
        rows=(
            *base.rows,
            Row("id2label", read_labels, write_labels),
            pooling,
            fixed(pooled_activation=head.activation),
        ),
        tensors=(*prefixed(head.prefix, base.tensors), *tensors),
        not_compared=frozenset({"labels"}),  # names that only number the outputs are read as none
        ignored=(*base.ignored, "lm_head.", "cls."),
        prefix="",
        presence=(),
    )


def read_pooling(published: Published, _: ModelConfig) -> Any:
    """Read which hidden states EuroBERT's classifier pools."""
    named = published.values.get("classifier_pooling", "late")
    pooling = next((own for own, name in POOLINGS.items() if name == named), None)
    if pooling is None:
        raise published.refuse("classifier_pooling", named, ", ".join(POOLINGS.values()))
    return pooling


POOLING = converted("classifier_pooling", "pooling", read_pooling, POOLINGS.get)
CONDITIONAL = Head("classification_head.out_proj", "classification_head.dense", "last", "tanh")
_BERT = classifier(
    replace(BERT, rows=BERT_BARE.rows),
    "BertForSequenceClassification",
    Head("classifier", "bert.pooler.dense", "first", "tanh"),
)

CLASSIFIERS = (
    classifier(LLAMA, "LlamaForSequenceClassification", Head("score")),
    classifier(QWEN3, "Qwen3ForSequenceClassification", Head("score")),
    classifier(GPT2, "GPT2ForSequenceClassification", Head("score")),
    # Any BERT may get this head: what was said of its head over the vocabulary has no effect anymore.
    replace(
        _BERT,
        not_compared=_BERT.not_compared | {"tie_embeddings", "logits_bias", "head_transform"},
        ignored=("position_ids", "cls."),
    ),
    classifier(EUROBERT, "EuroBertForSequenceClassification", Head("classifier", "dense", POOLING, "gelu")),
    classifier(T5, "T5ForSequenceClassification", replace(CONDITIONAL, prefix="transformer.")),
    # Whether BART's logits had a bias still follows from the tensors: there is none.
    replace(classifier(BART, "BartForSequenceClassification", CONDITIONAL), presence=BART.presence),
)

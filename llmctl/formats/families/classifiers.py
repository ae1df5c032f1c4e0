"""Published classifiers: the families' own bodies under the head that transformers gives each of them.

A row is made from the family's row by exchanging the head, so that a body is described once. What no published class
expresses (another pooling, Marian) is written in the native format.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from llmctl.config import ModelConfig, Problem
from llmctl.formats.families.bart import BART
from llmctl.formats.families.bert import BERT, BERT_BARE, is_bert
from llmctl.formats.families.family import FamilyFormat, Published, same_config
from llmctl.formats.families.gpt2 import GPT2
from llmctl.formats.families.llama import EUROBERT, LLAMA, QWEN3
from llmctl.formats.families.parameters import Stored, plain, with_bias
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
    """How a published class names the parts of its head, and what it does to a state before."""

    classifier: str
    dense: str = ""
    pooling: str = "last"
    activation: str = "none"
    prefix: str = ""
    """What the class puts before the names of the body."""


def body_config(config: ModelConfig) -> ModelConfig:
    """Return the config of the model under a classification head."""
    return replace(config, n_labels=0, labels=())


def read_head(values: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Read number, names and kind of the outputs."""
    hf = Published(values, architecture)
    names = values.get("id2label") or {str(number): f"LABEL_{number}" for number in range(2)}
    if not isinstance(names, dict) or sorted(names, key=str) != sorted(map(str, range(len(names)))):
        raise hf.refuse("id2label", names, "names of the outputs by number from 0")
    labels = tuple(str(names[str(number)]) for number in range(len(names)))
    is_named = labels != tuple(f"LABEL_{number}" for number in range(len(labels)))
    kind = values.get("problem_type") or ("regression" if len(labels) == 1 else PROBLEMS["single"])
    problem = next((ours for ours, theirs in PROBLEMS.items() if theirs == kind), None)
    if problem not in get_args(Problem):
        raise hf.refuse("problem_type", kind, ", ".join(PROBLEMS.values()))
    return {"n_labels": len(labels), "labels": labels if is_named else (), "problem": problem}


def write_head(config: ModelConfig) -> dict[str, Any]:
    """Write number, names and kind of the outputs."""
    labels = config.labels or tuple(f"LABEL_{number}" for number in range(config.n_labels))
    return {
        "id2label": {str(number): name for number, name in enumerate(labels)},
        "label2id": {name: number for number, name in enumerate(labels)},
        "problem_type": PROBLEMS[config.problem],
    }


def classifier(base: FamilyFormat, architecture: str, head: Head) -> FamilyFormat:
    """Return the row of a family's published classifier."""

    def read_config(values: Mapping[str, Any]) -> ModelConfig:
        shape: dict[str, Any] = {"pooling": head.pooling, "pooled_activation": head.activation}
        return replace(base.read_config(values), **shape, **read_head(values, architecture))

    def write_config(config: ModelConfig) -> dict[str, Any]:
        return base.write_config(body_config(config)) | write_head(config)

    def matches(config: ModelConfig) -> bool:
        fits = config.n_labels > 0 and config.pooling == head.pooling and config.pooled_activation == head.activation
        return fits and base.matches(body_config(config))

    def layout(config: ModelConfig) -> list[Stored]:
        body = [
            replace(stored, name=head.prefix + stored.name)
            for stored in base.layout(body_config(config))
            if not stored.holds[0].startswith(("lm_head", "head_"))
        ]
        if not head.dense:
            return [*body, plain(head.classifier + ".weight", "classifier.weight")]
        return [*body, *with_bias({head.dense: "classifier_dense", head.classifier: "classifier"})]

    return FamilyFormat(
        architecture=architecture,
        model_type=base.model_type,
        source=base.source,
        read_config=read_config,
        write_config=write_config,
        matches=matches,
        layout=layout,
        resolve=same_config,  # the tensors tell nothing more: the head they would tell of is not there
        ignored=(*base.ignored, "lm_head.", "cls."),
        spellings=base.spellings,
    )


def bert_matches(config: ModelConfig) -> bool:
    """Say whether the config is BERT's, whatever head it had over the vocabulary."""
    return (
        config.n_labels > 0
        and config.pooling == "first"
        and config.pooled_activation == "tanh"
        and is_bert(body_config(config))
    )


def eurobert_pooling(config: ModelConfig) -> bool:
    """Say whether EuroBERT's classifier has this head."""
    fits = config.n_labels > 0 and config.pooling in POOLINGS and config.pooled_activation == "gelu"
    return fits and EUROBERT.matches(body_config(config))


def read_eurobert(values: Mapping[str, Any]) -> ModelConfig:
    """Read a EuroBERT classifier that pools states, not outputs."""
    named = values.get("classifier_pooling", "late")
    pooling: Any = next((ours for ours, theirs in POOLINGS.items() if theirs == named), None)
    if pooling is None:
        raise Published(values, EUROBERT_NAME).refuse("classifier_pooling", named, ", ".join(POOLINGS.values()))
    return replace(_EUROBERT.read_config(values), pooling=pooling)


def write_eurobert(config: ModelConfig) -> dict[str, Any]:
    """Write a EuroBERT classifier."""
    return _EUROBERT.write_config(config) | {"classifier_pooling": POOLINGS[config.pooling]}


EUROBERT_NAME = "EuroBertForSequenceClassification"
_BERT = classifier(
    replace(BERT, read_config=BERT_BARE.read_config),
    "BertForSequenceClassification",
    Head("classifier", "bert.pooler.dense", "first", "tanh"),
)
_EUROBERT = classifier(EUROBERT, EUROBERT_NAME, Head("classifier", "dense", "mean", "gelu"))
CONDITIONAL = Head("classification_head.out_proj", "classification_head.dense", "last", "tanh")

CLASSIFIERS = (
    classifier(LLAMA, "LlamaForSequenceClassification", Head("score")),
    classifier(QWEN3, "Qwen3ForSequenceClassification", Head("score")),
    classifier(GPT2, "GPT2ForSequenceClassification", Head("score")),
    replace(_BERT, matches=bert_matches, ignored=("position_ids", "cls.")),
    replace(_EUROBERT, matches=eurobert_pooling, read_config=read_eurobert, write_config=write_eurobert),
    classifier(T5, "T5ForSequenceClassification", replace(CONDITIONAL, prefix="transformer.")),
    replace(classifier(BART, "BartForSequenceClassification", CONDITIONAL), resolve=BART.resolve),
)

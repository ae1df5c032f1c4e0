"""Published classifiers: the families' own bodies with the head that transformers gives each of them.

A classifier is the family's table with other rows for the head, so that a body is described once. What no published
class expresses (another pooling, Marian) is written in the native format.
"""

from dataclasses import dataclass, replace
from typing import Any

from llmctl.config import ModelConfig
from llmctl.families.bart import BART
from llmctl.families.bert import BERT, BERT_BARE
from llmctl.families.cohere import NEMOTRON, STABLELM, STARCODER2
from llmctl.families.deberta import DEBERTA_BARE, width_of
from llmctl.families.family import FamilyFormat
from llmctl.families.gemma import GEMMA, GEMMA2, GEMMA3
from llmctl.families.gpt import BIGCODE, BLOOM, FALCON, GPT_J, GPT_NEO, GPT_NEOX, MPT, OPT
from llmctl.families.gpt2 import GPT2
from llmctl.families.llama import EUROBERT, HELIUM, LLAMA, MINISTRAL, MISTRAL, QWEN2, QWEN3, SMOLLM3
from llmctl.families.olmo import EXAONE4
from llmctl.families.parameters import Tensors, module, prefixed
from llmctl.families.phi import PHI, PHI3
from llmctl.families.published import Published
from llmctl.families.roberta import (
    ALBERT_BARE,
    CAMEMBERT_BARE,
    DISTILBERT_BARE,
    ELECTRA_BARE,
    MPNET_BARE,
    ROBERTA_BARE,
    XLM_ROBERTA_BARE,
)
from llmctl.families.roformer import ROFORMER_BARE, sinusoids_of_body
from llmctl.families.rows import Row, converted, fixed, only
from llmctl.families.t5 import T5

CLASS = "ForSequenceClassification"
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


def read_names(published: Published) -> tuple[str, ...]:
    """Read the names of the outputs, whose number is theirs."""
    names = published.values.get("id2label") or dict(zip("01", numbered(2), strict=True))
    # Any order of the keys, but no gap: the number of an output is its row in the weight.
    if not isinstance(names, dict) or sorted(names, key=str) != sorted(map(str, range(len(names)))):
        raise published.refuse("id2label", names, "names of the outputs by number from 0")
    return tuple(str(names[str(number)]) for number in range(len(names)))


def read_labels(published: Published, _: ModelConfig) -> dict[str, Any]:
    """Read number, names and kind of the outputs."""
    labels = read_names(published)
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


def write_names(config: ModelConfig) -> dict[str, Any]:
    """Write number and names of the outputs."""
    labels = config.labels or numbered(config.n_labels)
    return {
        "id2label": {str(number): name for number, name in enumerate(labels)},
        "label2id": {name: number for number, name in enumerate(labels)},
    }


def write_labels(config: ModelConfig) -> dict[str, Any]:
    """Write number, names and kind of the outputs."""
    return write_names(config) | {"problem_type": PROBLEMS.get(config.problem)}


def classifier(base: FamilyFormat, architecture: str, head: Head) -> FamilyFormat:
    """Return a family's published classifier; the head over the vocabulary and what tells of it are gone."""
    pooling = head.pooling if isinstance(head.pooling, Row) else fixed(pooling=head.pooling)
    tensors: Tensors = module(head.classifier, "classifier")
    if head.dense:
        tensors = (*module(head.dense, "classifier_dense"), *tensors)
    return replace(
        base,
        architecture=architecture,
        aliases=(),
        rows=(
            *base.rows,
            Row("id2label", read_labels, write_labels),
            pooling,
            fixed(pooled_activation=head.activation),
        ),
        tensors=(*prefixed(head.prefix, base.tensors), *tensors),
        not_compared=frozenset({"labels"}),  # names that only number the outputs are read as none
        # The pooler of an encoder is the dense layer of its classifier.
        ignored=(*(part for part in base.ignored if part != "pooler." or not head.dense), "lm_head.", "cls."),
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

NAMES = {"gemma3_text": "Gemma3TextForSequenceClassification"}


def name_of(family: FamilyFormat) -> str:
    """Return the usual name of a family's classifier."""
    return family.architecture.partition("For")[0].removesuffix("LMHeadModel") + CLASS


# Decoders are classified by the state of the last token, with a head without bias.
DECODERS = tuple(
    classifier(family, NAMES.get(family.model_type) or name_of(family), Head("score"))
    for family in (
        *(LLAMA, QWEN3, GPT2, QWEN2, MISTRAL, GEMMA, GEMMA2, GEMMA3, PHI3, PHI, SMOLLM3, STARCODER2, STABLELM),
        *(GPT_NEOX, GPT_NEO, GPT_J, OPT, BLOOM, MPT, FALCON, BIGCODE, NEMOTRON, HELIUM, EXAONE4, MINISTRAL),
    )
)


def encoder(base: FamilyFormat, head: Head, *, prefix: str) -> FamilyFormat:
    """Return the classifier of an encoder without a head over the vocabulary."""
    name = base.architecture.removesuffix("Model") + CLASS
    # What was said of a head over the vocabulary has no effect anymore.
    row = classifier(base, name, replace(head, prefix=prefix))
    return replace(
        row,
        not_compared=row.not_compared | {"tie_embeddings", "logits_bias", "head_transform"},
        spellings=tuple(pair for pair in base.spellings if pair[1]),
    )


ROBERTA_HEAD = Head("classifier.out_proj", "classifier.dense", "first", "tanh")
CLASSIFIERS = (
    *DECODERS,
    # Any BERT may get this head: what was said of its head over the vocabulary has no effect anymore.
    replace(
        _BERT,
        not_compared=_BERT.not_compared | {"tie_embeddings", "logits_bias", "head_transform"},
        ignored=("position_ids", "cls."),
    ),
    classifier(EUROBERT, "EuroBertForSequenceClassification", Head("classifier", "dense", POOLING, "gelu")),
    classifier(T5, "T5ForSequenceClassification", replace(CONDITIONAL, prefix="transformer.")),
    encoder(ROBERTA_BARE, ROBERTA_HEAD, prefix="roberta."),
    encoder(XLM_ROBERTA_BARE, ROBERTA_HEAD, prefix="roberta."),
    encoder(CAMEMBERT_BARE, ROBERTA_HEAD, prefix="roberta."),
    encoder(MPNET_BARE, ROBERTA_HEAD, prefix="mpnet."),
    encoder(DISTILBERT_BARE, Head("classifier", "pre_classifier", "first", "relu"), prefix="distilbert."),
    encoder(ELECTRA_BARE, replace(ROBERTA_HEAD, activation="gelu"), prefix="electra."),
    encoder(ALBERT_BARE, Head("classifier", "albert.pooler", "first", "tanh"), prefix="albert."),
    encoder(
        replace(
            DEBERTA_BARE,
            rows=(*DEBERTA_BARE.rows, only("pooler_hidden_act", "gelu"), width_of("pooler_hidden_size")),
        ),
        Head("classifier", "pooler.dense", "first", "gelu"),
        prefix="deberta.",
    ),
    replace(
        encoder(
            # The head's activation is the model's.
            replace(ROFORMER_BARE, rows=(*ROFORMER_BARE.rows, only("hidden_act", "gelu"))),
            replace(ROBERTA_HEAD, activation="gelu"),
            prefix="roformer.",
        ),
        constants=sinusoids_of_body,
    ),
    # Whether BART's logits had a bias still follows from the tensors: there is none.
    replace(
        classifier(BART, "BartForSequenceClassification", CONDITIONAL),
        presence=BART.presence,
        not_compared=BART.not_compared | {"logits_bias"},  # without a vocabulary head it has no effect
    ),
)

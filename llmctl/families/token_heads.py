"""Published encoders that label every token (named entities), or find the start and the end of an answer in a text.

The head is one linear layer over the last hidden states, in ModernBERT after the transform that its other heads have.
"""

from dataclasses import replace
from typing import Any

from llmctl.config import Head, ModelConfig
from llmctl.families.bert import BERT_BARE
from llmctl.families.classifiers import numbered, read_names, write_names
from llmctl.families.family import FamilyFormat
from llmctl.families.llama import EUROBERT
from llmctl.families.modernbert import HEAD_ROWS, MODERNBERT_BARE
from llmctl.families.parameters import Tensors, module, prefixed
from llmctl.families.published import Published
from llmctl.families.roberta import (
    ALBERT_BARE,
    CAMEMBERT_BARE,
    DISTILBERT_BARE,
    ELECTRA_BARE,
    ERNIE_BARE,
    MEGATRON,
    MPNET_BARE,
    ROBERTA_BARE,
    WITH_HEAD,
    XLM_ROBERTA_BARE,
)
from llmctl.families.rows import Row

CLASSES: dict[Head, tuple[str, str]] = {
    "tokens": ("ForTokenClassification", "classifier"),
    "span": ("ForQuestionAnswering", "qa_outputs"),
}
"""Head -> the end of the class's name, and the name of its layer."""


def read_token_labels(published: Published, _: ModelConfig) -> dict[str, Any]:
    """Read number and names of the labels of a token."""
    labels = read_names(published)
    return {"head": "tokens", "n_labels": len(labels), "labels": () if labels == numbered(len(labels)) else labels}


def read_span(published: Published, _: ModelConfig) -> dict[str, Any]:
    """Check that the outputs are start and end, which files name by their numbers."""
    labels = read_names(published)
    if len(labels) != 2:
        raise published.refuse("id2label", list(labels), "two outputs, start and end")
    return {"head": "span", "n_labels": 2}


READ = {"tokens": read_token_labels, "span": read_span}


def headed(base: FamilyFormat, head: Head, *, prefix: str, layer: str = "", before: Tensors = ()) -> FamilyFormat:
    """Return the class of an encoder without a head that has one over its tokens.

    prefix: what the class puts before the names of the body. layer: the name of the linear layer, if not the usual.
    before: the tensors of a transform.
    """
    ending, usual = CLASSES[head]
    return replace(
        base,
        architecture=base.architecture.partition("For")[0].removesuffix("Model") + ending,
        aliases=(),
        rows=(*base.rows, Row("id2label", READ[head], write_names)),
        tensors=(*prefixed(prefix, base.tensors), *before, *module(layer or usual, "classifier")),
        # What was said of a head over the vocabulary has no effect anymore.
        not_compared=base.not_compared | {"labels", "tie_embeddings", "logits_bias"},
        ignored=(*(part for part in base.ignored if part != "head."), "lm_head.", "cls."),
        prefix="",
        presence=(),
        substitutes=(),
        spellings=tuple(pair for pair in base.spellings if pair[1]),
    )


MEGATRON_BARE = replace(
    MEGATRON,
    rows=tuple(row for row in MEGATRON.rows if row is not WITH_HEAD),
    tensors=tuple(stored for stored in MEGATRON.tensors if not stored.name.startswith("cls.")),
)
TRANSFORMED = replace(
    MODERNBERT_BARE, rows=(*MODERNBERT_BARE.rows, *(row for row in HEAD_ROWS if row.key != "decoder_bias"))
)
TRANSFORM = (*module("head.dense", "head_dense"), *module("head.norm", "head_norm"))
ENCODERS = (
    *((BERT_BARE, "bert."), (ROBERTA_BARE, "roberta."), (XLM_ROBERTA_BARE, "roberta."), (CAMEMBERT_BARE, "roberta.")),
    *((DISTILBERT_BARE, "distilbert."), (ALBERT_BARE, "albert."), (ELECTRA_BARE, "electra."), (MPNET_BARE, "mpnet.")),
    *((ERNIE_BARE, "ernie."), (MEGATRON_BARE, "")),
)
HEADS: tuple[Head, ...] = ("tokens", "span")
TOKEN_HEADS = (
    *(headed(base, head, prefix=prefix) for head in HEADS for base, prefix in ENCODERS),
    *(headed(TRANSFORMED, head, prefix="model.", layer="classifier", before=TRANSFORM) for head in HEADS),
    headed(EUROBERT, "tokens", prefix=""),
)

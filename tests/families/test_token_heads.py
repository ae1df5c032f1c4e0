"""Heads over tokens: what their files name, and what is refused."""

import pytest

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError, UsageError
from llmctl.families.table import FAMILIES, family_for
from llmctl.families.token_heads import TOKEN_HEADS
from llmctl.model.shapes import complete
from tests.support.architectures import BERT

NAMES = {"0": "O", "1": "B-PER", "2": "I-PER"}


def test_every_family_has_both_heads_but_eurobert():
    kinds = [row.architecture.partition("For") for row in TOKEN_HEADS]
    tokens = {body for body, _, kind in kinds if kind == "TokenClassification"}
    span = {body for body, _, kind in kinds if kind == "QuestionAnswering"}
    assert tokens - span == {"EuroBert"}
    assert len(span) == 11


def test_labels_are_read_and_written():
    family = FAMILIES["BertForTokenClassification"]
    config = complete(family.read_config(BERT | {"id2label": NAMES}))
    assert (config.head, config.n_labels, config.labels) == ("tokens", 3, ("O", "B-PER", "I-PER"))
    assert family.write_config(config)["id2label"] == NAMES
    assert family_for(config) is family
    unnamed = complete(family.read_config(BERT))
    assert (unnamed.n_labels, unnamed.labels) == (2, ())
    assert family.write_config(unnamed)["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("BertForTokenClassification", {"0": "O", "2": "B"}),
        ("BertForTokenClassification", ["O"]),
        ("BertForQuestionAnswering", NAMES),
        ("DistilBertForQuestionAnswering", {"0": "start"}),
    ],
)
def test_other_outputs_are_refused(architecture, names):
    with pytest.raises(ArtifactError, match="id2label"):
        FAMILIES[architecture].read_config(BERT | {"id2label": names})


@pytest.mark.parametrize("kind", ["tokens", "span"])
def test_no_other_family_takes_a_head_over_tokens_for_its_own(kind):
    settings = BERT | ({"id2label": NAMES} if kind == "tokens" else {})
    ending = {"tokens": "BertForTokenClassification", "span": "BertForQuestionAnswering"}[kind]
    config = complete(FAMILIES[ending].read_config(settings))
    fitting = {row.architecture for row in FAMILIES.values() if row.expresses(config) and row in TOKEN_HEADS}
    assert fitting >= {ending}
    assert all(name.endswith(ending.removeprefix("Bert")) for name in fitting)
    others = [row.architecture for row in FAMILIES.values() if row not in TOKEN_HEADS and row.expresses(config)]
    assert others == ["LlmctlForLanguageModel"]


@pytest.mark.parametrize(
    "fields",
    [
        {"family": "decoder", "n_labels": 3},
        {"family": "encoder", "n_labels": 0},
        {"family": "encoder", "n_labels": 3, "pooled_activation": "tanh"},
        {"family": "encoder", "n_labels": 3, "head": "span"},
    ],
)
def test_a_head_over_tokens_needs_an_encoder_and_labels(fields):
    with pytest.raises(UsageError, match=r"model\.head"):
        complete(ModelConfig(**({"vocab_size": 8, "head": "tokens"} | fields)))

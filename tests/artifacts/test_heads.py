"""Heads: which one a family gets, what is taken over into it, and what does not fit."""

import pytest
import torch

from llmctl.artifacts.heads import head_config, published_pooler, with_head
from llmctl.artifacts.load import load_model
from llmctl.config import QuantizeConfig, WeightsConfig
from llmctl.data.labels import Labels
from llmctl.errors import ArtifactError
from llmctl.families.table import family_for
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.safetensors import read_tensors, write_safetensors
from llmctl.model.quantized import schemes_of
from llmctl.quantizing.calibrate import calibrate
from llmctl.quantizing.packed_state import stored_state
from llmctl.quantizing.settings import plan_of
from tests.support.tuning import FAMILIES

LABELS = Labels("single", ("no", "yes", "猫"))
PUBLISHED = {
    "decoder": "LlamaForSequenceClassification",
    "encoder": "EuroBertForSequenceClassification",
    "bert": "BertForSequenceClassification",
    "encoder_decoder": "T5ForSequenceClassification",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gets_the_head_of_its_published_classifier(models, family):
    base = load_model(models[family], device="cpu", dtype="float32")
    classifier = with_head(base, LABELS, 3, pooling="auto", seed=0)
    assert family_for(classifier.config).architecture == PUBLISHED[family]
    again = with_head(base, LABELS, 3, pooling="auto", seed=0)
    other = with_head(base, LABELS, 3, pooling="auto", seed=1)
    assert torch.equal(classifier.classifier.weight, again.classifier.weight)
    assert not torch.equal(classifier.classifier.weight, other.classifier.weight)
    body, state = base.model.state_dict(), classifier.state_dict()
    assert all(torch.equal(state[name], body[name]) for name in state if not name.startswith("classifier"))
    assert head_config(base.model.config, LABELS, 3, "mean").pooling == "mean"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_body_in_few_bits_stays_what_it_was(models, tmp_path, family):
    base = load_model(models[family], device="cpu", dtype="float32")
    plan = plan_of(base.model.config, QuantizeConfig(weights=WeightsConfig(scheme="int4")))
    found = calibrate(base.model, plan, "clip", [], lambda _: None)
    state, files = stored_state(base.model, found, plan), base.artifact.files
    out = write_artifact(tmp_path / "m", base.model.config, state, files=files, provenance={}, schemes=plan)
    packed = load_model(out, device="cpu", dtype="float32", packed=True)
    classifier = with_head(packed, LABELS, 3, pooling="auto", seed=0)
    assert set(schemes_of(classifier)) == set(schemes_of(packed.model)) - {"lm_head"}
    body, state = packed.model.state_dict(), classifier.state_dict()
    assert all(torch.equal(state[name], body[name]) for name in state if not name.startswith("classifier"))


def test_a_published_pooler_is_taken_over(models, tmp_path):
    artifact = read_artifact(models["bert"])
    out = write_artifact(tmp_path / "m", artifact.config, artifact.state(), files=artifact.files, provenance={})
    assert published_pooler(load_model(out, device="cpu")) == {}
    pooler = {"pooler.dense.weight": torch.randn(32, 32), "pooler.dense.bias": torch.randn(32)}
    file = out / "model.safetensors"
    metadata = read_artifact(out).metadata
    tensors = {name: tensor.clone() for name, tensor in read_tensors(file).items()}
    write_safetensors(file, tensors | pooler, metadata)
    classifier = with_head(load_model(out, device="cpu"), LABELS, 3, pooling="auto", seed=0)
    assert torch.equal(classifier.classifier_dense.weight, pooler["pooler.dense.weight"])
    assert torch.equal(classifier.classifier_dense.bias, pooler["pooler.dense.bias"])


def test_a_head_for_other_labels_is_refused(models, tmp_path):
    base = load_model(models["encoder"], device="cpu")
    model = with_head(base, LABELS, 3, pooling="auto", seed=0)
    out = write_artifact(tmp_path / "m", model.config, model.state_dict(), files=base.artifact.files, provenance={})
    three = load_model(out, device="cpu")
    assert with_head(three, LABELS, 3, pooling="auto", seed=5) is three.model
    for labels, n_outputs in (
        (Labels("single", ("a", "b")), 2),
        (Labels("single", ("a", "b", "c")), 3),
        (Labels("regression"), 1),
    ):
        with pytest.raises(ArtifactError, match="3 outputs"):
            with_head(three, labels, n_outputs, pooling="auto", seed=0)
